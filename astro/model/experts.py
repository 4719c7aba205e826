"""The experts of a mixture-of-experts block: modules that hold the weights of all experts in parameters [E, ·, ·].

Which rows of such a parameter belong to gate, and which to up, is read off the module, as transformers declares it.
"""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from astro.errors import CheckpointError, UnsupportedError
from astro.model.linear_layer import LinearLayer
from astro.model.zero_experts import spare_expert

__all__ = [
    "call_alone",
    "expert_layers",
    "expert_owners",
    "experts_of",
    "has_biases",
    "is_gate",
    "num_experts",
    "parts_of",
    "reads_inputs",
]

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""The layers in each parameter of an experts' module, in the order of their rows."""
_JOINED = {"gate_up_proj": "w13", "down_proj": "w2"}
"""Names of the packed experts of gpt-oss, whose gate and up alternate: servers load both as one layer."""
_UNDECLARED = {
    "Llama4TextExperts": {"is_transposed": True, "is_concatenated": True},
    "LongcatFlashExperts": {"is_transposed": False, "is_concatenated": True},
}
"""Layouts of experts that transformers does not declare, read from its source."""
_BLOCK = re.compile(r"(.*?\.\d+)\.(.*)")
"""A block's name, and that of something in the block."""
_EXPERT = re.compile(r"(.*?\.experts)\.\d+\.")
"""The beginning of the name of an expert's layer."""


def num_experts(block: nn.Module) -> int | None:
    """Return the number of experts of a block; None where it has none.

    Args:
        block: The block.
    """
    parameters = (named for module in block.modules() for named in module.named_parameters(recurse=False))
    return next((len(parameter) for name, parameter in parameters if _holds_all_experts(name, parameter)), None)


def parts_of(parameter_name: str) -> tuple[str, ...]:
    """Return the names of the layers in a parameter that holds all experts; empty for any other parameter.

    Args:
        parameter_name: Name of the parameter in its module.
    """
    return _PARTS.get(parameter_name, ())


def expert_owners(block: nn.Module, prefix: str) -> set[str]:
    """Return the names of the modules that the experts' modules of a block are parts of.

    Args:
        block: The block.
        prefix: Name of the block in the model.
    """
    return {
        module_name.rpartition(".")[0]
        for module_name, module in block.named_modules(prefix=prefix)
        if any(_holds_all_experts(*named) for named in module.named_parameters(recurse=False))
    }


def is_gate(name: str, linear: nn.Linear, experts: int | None, owners: Set[str]) -> bool:
    """Tell whether a linear layer stays as it is: a gate, or one that works on groups of heads.

    Gates route tokens or weigh outputs; they are tiny, and much hangs on them. Of a layer on groups of heads, such as
    DeepSeek-V4's `o_a_proj`, each group of rows reads inputs of its own, so that there is no single Hessian.

    Args:
        name: Name of the layer.
        linear: The layer.
        experts: Number of experts; None where the block has none.
        owners: Names of the modules that experts' modules are parts of. A layer elsewhere may happen to have as many
            rows as there are experts.
    """
    grandparent, _, parent = name.rpartition(".")[0].rpartition(".")
    if parent == "router" or getattr(linear, "n_groups", 1) > 1:
        return True
    beside = f"{grandparent}.{parent}" in owners or (grandparent in owners and parent in ("router", "gate"))
    return linear.out_features == 1 or (linear.out_features == experts and beside)


def expert_layers(
    name: str, module: nn.Module, parameter_name: str, converted: Mapping[tuple[int, int], str], keys: Mapping[str, str]
) -> list[LinearLayer]:
    """Return the layers in one parameter of an experts' module.

    Args:
        name: Name of the module in the model.
        module: The module.
        parameter_name: Name of the parameter in the module.
        converted: Checkpoint tensors by expert and by the number of the layer in the parameter, where the checkpoint
            holds every expert apart and transformers joins them.
        keys: Checkpoint tensors by the model's name for them.

    Raises:
        UnsupportedError: The module's layout is not known.
        CheckpointError: A weight is missing from the checkpoint.
    """
    layout = _UNDECLARED.get(type(module).__name__, vars(module))
    parameter = module.get_parameter(parameter_name)
    if parameter_name not in _PARTS or "is_transposed" not in layout:
        raise UnsupportedError(
            f"{name}.{parameter_name} is a {type(module).__name__} parameter of shape {list(parameter.shape)}: "
            "experts in a layout that is not known here"
        )
    if converted and len(parameter) > 1 and not any(expert for expert, _ in converted):
        raise UnsupportedError(
            f"{name}.{parameter_name}: its checkpoint tensors are converted in a way that is not known here"
        )
    parts = _PARTS[parameter_name]
    transposed, together = bool(layout["is_transposed"]), bool(layout["is_concatenated"])
    target = f"{name}.{parameter_name}"
    fused, bias = keys.get(target), keys.get(f"{target}_bias")
    is_joined = not together and (fused is not None or f"{name}.0.{_JOINED[parameter_name]}.weight" in keys)
    if is_joined:
        parts = (_JOINED[parameter_name],)
    columns, rows = parameter.shape[1:] if transposed else reversed(parameter.shape[1:])
    rows //= len(parts)
    layers = []
    for expert in range(len(parameter)):
        for number, part in enumerate(parts):
            unfused = f"{name}.{expert}.{part}"
            key = converted.get((expert, number)) or fused or keys.get(f"{unfused}.weight")
            if key is None:
                raise CheckpointError(f"the checkpoint has no tensor for {part} of expert {expert} of {name}")
            first, step = (number * rows, 1) if together else (number, len(parts))
            stem = f"{_stored_name(name, key)}.{expert}.{part}" if key == fused else key.removesuffix(".weight")
            layer = LinearLayer(stem, key, rows, columns, stem, target, expert, first, step, transposed, bias)
            if is_joined:
                members = tuple(f"{stem.rpartition('.')[0]}.{member}" for member in _PARTS[parameter_name])
                layer = dataclasses.replace(layer, joint="_", served_as=members)
            layers.append(layer)
    return layers


def _stored_name(name: str, key: str) -> str:
    """Return what packed experts are called: as in the model, below the block's name in the checkpoint.

    Servers ask for `experts.E` wherever the checkpoint has all experts fused, also where it calls them otherwise, as
    Granite's `block_sparse_moe.input_linear.weight`. But the block may have another prefix in the checkpoint.

    Args:
        name: Name of the experts' module in the model.
        key: Name of the checkpoint tensor that holds the experts.
    """
    inside, outside = _BLOCK.match(name), _BLOCK.match(key)
    return f"{outside[1]}.{inside[2]}" if inside and outside else key.rpartition(".")[0]


def reads_inputs(parameter: str) -> bool:
    """Tell whether the layers in a parameter read what goes into the experts, and not what another layer made of it.

    Args:
        parameter: Name of the parameter of an experts' module.
    """
    return parameter.rpartition(".")[2] != "down_proj"


def has_biases(name: str, module: nn.Module, parameter_name: str, keys: Mapping[str, str]) -> bool:
    """Tell whether a checkpoint that holds experts apart has all biases of one of their parameters [E, rows].

    Args:
        name: Name of the experts' module in the model.
        module: The experts' module.
        parameter_name: Name of the parameter in the module.
        keys: Checkpoint tensors by the model's name for them.
    """
    weight, count = parameter_name.removesuffix("_bias"), len(module.get_parameter(parameter_name))
    if weight not in _PARTS:
        return False
    apart = [f"{name}.{expert}.{part}.bias" for expert in range(count) for part in _PARTS[weight]]
    joined = [f"{name}.{expert}.{_JOINED.get(weight)}_bias" for expert in range(count)]
    return all(key in keys for key in apart) or all(key in keys for key in joined)


def call_alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], X: torch.Tensor, expert: int) -> None:
    """Run an experts' module so that every token goes through one expert, and through no other but a spare one.

    Args:
        module: The experts' module.
        args: Positional arguments of an ordinary call of the module.
        kwargs: Keyword arguments of that call.
        X: Input [..., C] of the mixture of experts around the module. It is used where the module takes a single
            argument, which has a row for every expert and token, already scaled by the weight of the expert.
        expert: Index of the expert.
    """
    values = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    X = X if len(values) == 1 else values[0]
    X = X.reshape(-1, X.shape[-1])
    if len(values) == 1:  # rows of experts that a token is not sent to are zero
        rows = X.new_zeros(values[0].numel() // X.numel(), *X.shape)
        rows[expert] = X
        module(rows.reshape(values[0].shape))
        return
    index = torch.full((len(X), 1), expert, dtype=values[1].dtype, device=X.device)
    spare = spare_expert(module)
    if spare is not None:
        index = torch.cat([index, torch.full_like(index, spare if spare != expert else 0)], dim=1)
    module(X, index, torch.ones_like(index, dtype=values[2].dtype))


def _holds_all_experts(parameter_name: str, parameter: nn.Parameter) -> bool:
    return parameter_name in _PARTS and parameter.ndim == 3


def experts_of(name: str) -> str | None:
    """Return the name of the experts that a layer belongs to, which servers hold as a unit; None outside experts.

    Args:
        name: Name of the layer.
    """
    match = _EXPERT.match(name)
    return match[1] if match else None
