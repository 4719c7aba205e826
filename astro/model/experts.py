"""The experts of a mixture-of-experts block: modules that hold the weights of all of them in parameters [E, ·, ·].

Which rows of such a parameter are whose is read off the module, as transformers declares it.
"""

import inspect
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from astro.errors import CheckpointError, UnsupportedError
from astro.model.linear_layer import LinearLayer

__all__ = [
    "call_alone",
    "expert_layers",
    "expert_owners",
    "experts_of",
    "has_biases",
    "is_gate",
    "num_experts",
    "reads_inputs",
]

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Layers in a parameter of an experts' module, in the order of their rows."""
_UNDECLARED = {"Llama4TextExperts": {"is_transposed": True, "is_concatenated": True}}
"""Experts that transformers does not declare the layout of: its own source says."""


def num_experts(block: nn.Module) -> int | None:
    """Experts of a block; None where it has none."""
    counts = (len(p) for m in block.modules() for own, p in m.named_parameters(recurse=False) if _holds_all(own, p))
    return next(counts, None)


def expert_owners(block: nn.Module, prefix: str) -> set[str]:
    """Names of the modules that the experts' modules of a block are parts of."""
    modules = block.named_modules(prefix=prefix)
    holders = [name for name, m in modules if any(_holds_all(*found) for found in m.named_parameters(recurse=False))]
    return {name.rpartition(".")[0] for name in holders}


def is_gate(name: str, linear: nn.Linear, experts: int | None, owners: Set[str]) -> bool:
    """Whether a linear layer routes or weighs: tiny, and kept exact because all that follows hangs on it.

    Args:
        name: of the layer.
        linear: the layer.
        experts: their number, None where the block has none.
        owners: names of the modules that experts' modules are parts of. A layer elsewhere may have as many rows.
    """
    parent, _, own = name.rpartition(".")[0].rpartition(".")
    beside = f"{parent}.{own}" in owners or (parent in owners and own in ("router", "gate"))
    return linear.out_features == 1 or (linear.out_features == experts and beside)


def expert_layers(
    name: str, module: nn.Module, own: str, converted: Mapping[tuple[int, int], str], keys: Mapping[str, str]
) -> list[LinearLayer]:
    """The layers in one parameter of an experts' module.

    Args:
        name: of the module in the model.
        module: the module.
        own: name of its parameter.
        converted: the checkpoint tensor of an expert and a part, where the file holds them apart.
        keys: checkpoint tensors by the model's name for them.

    Raises:
        UnsupportedError: the module's layout is not known.
        CheckpointError: a weight is missing from the checkpoint.
    """
    layout = _UNDECLARED.get(type(module).__name__, vars(module))
    parameter = module.get_parameter(own)
    if own not in _PARTS or "is_transposed" not in layout:
        raise UnsupportedError(
            f"{name}.{own} is a {type(module).__name__} parameter of shape {list(parameter.shape)}: experts in a "
            "layout that is not known here"
        )
    if converted and len(parameter) > 1 and not any(expert for expert, _ in converted):
        raise UnsupportedError(f"{name}.{own}: its checkpoint tensors are converted in a way that is not known here")
    parts = _PARTS[own]
    transposed, together = bool(layout["is_transposed"]), bool(layout["is_concatenated"])
    columns, rows = parameter.shape[1:] if transposed else reversed(parameter.shape[1:])
    rows //= len(parts)
    fused, bias = keys.get(f"{name}.{own}"), keys.get(f"{name}.{own}_bias")
    layers = []
    for expert in range(len(parameter)):
        for number, part in enumerate(parts):
            unfused = f"{name}.{expert}.{part}"
            key = converted.get((expert, number)) or fused or keys.get(f"{unfused}.weight")
            if key is None:
                raise CheckpointError(f"the checkpoint has no tensor for {part} of expert {expert} of {name}")
            first, step = (number * rows, 1) if together else (number, len(parts))
            # By the checkpoint's own names, whatever they begin with.
            stem = f"{key.rpartition('.')[0]}.{expert}.{part}" if key == fused else key.removesuffix(".weight")
            layers.append(
                LinearLayer(stem, key, rows, columns, stem, f"{name}.{own}", expert, first, step, transposed, bias)
            )
    return layers


def reads_inputs(parameter: str) -> bool:
    """Whether the layers in a parameter read what the experts are given, and not what another layer made of it."""
    return parameter.rpartition(".")[2] != "down_proj"


def has_biases(name: str, module: nn.Module, own: str, keys: Mapping[str, str]) -> bool:
    """Whether a checkpoint that holds experts apart has all the biases of one of their parameters [E, rows].

    Args:
        name: of the experts' module in the model.
        module: the module.
        own: name of the parameter.
        keys: checkpoint tensors by the model's name for them.
    """
    parts, count = _PARTS.get(own.removesuffix("_bias"), ()), len(module.get_parameter(own))
    names = [f"{name}.{expert}.{part}.bias" for expert in range(count) for part in parts]
    return bool(names) and all(unfused in keys for unfused in names)


def call_alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], X: torch.Tensor, expert: int) -> None:
    """Run an experts' module so that every token goes through one expert, and through no other.

    Args:
        module: the experts.
        args: positional arguments of an ordinary call.
        kwargs: its keyword arguments.
        X: what the mixture of experts around it was given, [..., C]; used where the experts are given a row for every
            token, scaled by its weight.
        expert: index.
    """
    given = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    X = X if len(given) == 1 else given[0]
    X = X.reshape(-1, X.shape[-1])
    if len(given) == 1:  # zero where it was not chosen
        rows = X.new_zeros(given[0].numel() // X.numel(), *X.shape)
        rows[expert] = X
        module(rows.reshape(given[0].shape))
        return
    index = torch.full((len(X), 1), expert, dtype=given[1].dtype, device=X.device)
    module(X, index, torch.ones_like(index, dtype=given[2].dtype))


def _holds_all(own: str, parameter: nn.Parameter) -> bool:
    return own in _PARTS and parameter.ndim == 3


def experts_of(name: str) -> str | None:
    """The experts that an expert's layer is one of, which servers hold as one; None outside experts."""
    found = _EXPERT.match(name)
    return found[1] if found else None


_EXPERT = re.compile(r"(.*?\.experts)\.\d+\.")
