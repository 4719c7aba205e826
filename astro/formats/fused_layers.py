"""Layers that servers hold as one, although the checkpoint has them one by one: they must have one scheme."""

from collections.abc import Mapping, Sequence

from astro.config import LayerScheme
from astro.model.experts import experts_of

__all__ = ["fused_name", "mixed_layers"]

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}
"""Layers that vLLM fuses, by the name that it gives to the fused one."""


def fused_name(name: str) -> str | None:
    """Return what vLLM calls the layer that holds this one; None where it holds the layer as it is.

    Args:
        name: Name of a linear layer. All experts of a layer are one for vLLM.
    """
    parent, _, leaf = name.rpartition(".")
    fused = next((f"{parent}.{fused}" for fused, members in _FUSED.items() if leaf in members), None)
    return experts_of(name) or fused


def mixed_layers(schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> list[str]:
    """Say which layers servers hold as one although their schemes differ: one kind of each, the first that differs.

    Args:
        schemes: Every scheme that each quantized layer may get, by module name.
        ignore: Names of the linear modules that are not quantized.

    Returns:
        Sentences without an end, such as "a.q_proj and a.k_proj differ ...".
    """
    known = {**dict.fromkeys(ignore), **{name: tuple(possible) for name, possible in schemes.items()}}
    mixed = [(layers, "fuses them") for layers in _mixed_fusion(known)[:1]]
    mixed += [(f"the experts of {layer}", "holds them as one") for layer in _mixed_experts(known)[:1]]
    return [
        f"{layers} differ in width, group size or symmetry, or not all are quantized: vLLM {reason} and refuses such a "
        "model"
        for layers, reason in mixed
    ]


def _mixed_fusion(schemes: Mapping[str, tuple[LayerScheme, ...] | None]) -> list[str]:
    """Name layers that vLLM fuses and whose schemes differ; None stands for a layer that is not quantized."""
    mixed = []
    for name, possible in schemes.items():
        parent, _, leaf = name.rpartition(".")
        for fused in _FUSED.values():
            members = [f"{parent}.{member}" for member in fused if f"{parent}.{member}" in schemes]
            if leaf == fused[0] and any(schemes[member] != possible for member in members):
                mixed.append(" and ".join(members))
    return mixed


def _mixed_experts(schemes: Mapping[str, tuple[LayerScheme, ...] | None]) -> list[str]:
    first: dict[str, tuple[LayerScheme, ...] | None] = {}
    owners = ((experts_of(name), possible) for name, possible in schemes.items())
    return [
        experts
        for experts, possible in owners
        if experts is not None and first.setdefault(experts, possible) != possible
    ]
