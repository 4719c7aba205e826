"""Experts without weights, which pass their input on: LongCat's "zero experts".

Routers choose them like any other expert, with numbers behind those of the experts that compute. transformers gives
them a gate and an up projection all the same, which nothing reads: files that it writes have these, files of the Hub
do not.
"""

from collections.abc import Mapping

from torch import nn

__all__ = ["cut_zero_experts", "num_zero_experts", "spare_expert", "unread_keys"]

_FIRST, _LAST = "gate_up_proj", "down_proj"


def num_zero_experts(module: nn.Module) -> int:
    """Return how many zero experts the experts' modules in a module have, at most.

    Args:
        module: A block, or an experts' module.
    """
    return max((int(getattr(part, "zero_expert_num", 0)) for part in module.modules() if _has_them(part)), default=0)


def cut_zero_experts(model: nn.Module) -> dict[str, int]:
    """Leave a model on the meta device no weights for zero experts.

    Args:
        model: The model.

    Returns:
        Number of the experts that compute, by the name of each parameter that is cut.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if _has_them(module):
            first, count = module.get_parameter(_FIRST), len(module.get_parameter(_LAST))
            if len(first) > count:
                setattr(module, _FIRST, nn.Parameter(first.detach()[:count], requires_grad=first.requires_grad))
                counts[f"{name}.{_FIRST}"] = count
    return counts


def unread_keys(counts: Mapping[str, int], converted: Mapping[str, Mapping[tuple[int, int], str]]) -> set[str]:
    """Return the names of checkpoint tensors that belong to zero experts.

    Args:
        counts: What `cut_zero_experts` returned.
        converted: Checkpoint tensors by the model's parameter, and by expert and number of the layer in it.
    """
    return {
        key for name, count in counts.items() for (expert, _), key in converted.get(name, {}).items() if expert >= count
    }


def spare_expert(module: nn.Module) -> int | None:
    """Return the number of an expert to name beside another, where a module wants two for each token; else None.

    LongCat's experts fail where every token has a single expert. A zero expert costs nothing.

    Args:
        module: The experts' module.
    """
    return int(module.total_experts) - 1 if _has_them(module) else None  # type: ignore[arg-type]


def _has_them(module: nn.Module) -> bool:
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    return hasattr(module, "zero_expert_num") and hasattr(module, "total_experts") and {_FIRST, _LAST} <= parameters
