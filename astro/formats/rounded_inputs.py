"""What vLLM makes of rounded inputs in compressed-tensors `pack-quantized`: what it refuses, or leaves in 16 bits.

Read in the source of vLLM 0.32 and of its Humming kernels 0.1.20; no such kernel has run here. A layer of the class
`CompressedTensorsW4A8Fp8` has FP8 inputs, one of `CompressedTensorsWNA8Int` or `CompressedTensorsWNA4Int` integers.
The latter two name the inputs' type to no kernel but Humming's, and Humming's does not always go by it
(`check_and_fallback_input_schema`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from astro.activation_config import ActivationScheme
from astro.config import PER_CHANNEL, LayerScheme
from astro.formats.fused_layers import fused_name
from astro.model.experts import experts_of
from astro.model.linear_layer import LinearLayer

__all__ = ["HUMMING_OPTION", "inputs_notes", "inputs_refusal"]

HUMMING_OPTION = "--linear-backend humming"
"""Option of vLLM without which it prefers kernels that leave inputs in 16 bits."""
_FP8_WEIGHTS = LayerScheme(bits=4, group_size=128, symmetric=True)
"""The only weights that vLLM multiplies with FP8 inputs in this layout."""
_FP8_TILE = 128
"""Outputs of a layer are a multiple of this where CUTLASS multiplies int4 weights with FP8 inputs."""
_FP8_EXPERT_TILE = 256
"""The same for the inputs of experts, whose weights CUTLASS stores in another order."""
_STATIC_NOTE = (
    "{}: no server that we know of takes such inputs, and vLLM 0.32 refuses the model; it can be measured (`evaluate`) "
    "and runs in transformers. To serve it, take activations.clips: none, which gives each token a scale"
)
_LEAST_INT4_GROUP = 64
"""Columns of a group that Humming needs at least where it multiplies with int4 inputs."""
_OTHER_KERNELS = (4, 8)
"""Widths of weights for which vLLM has kernels that it prefers to Humming's, and that leave inputs in 16 bits."""


def inputs_refusal(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]], inputs: ActivationScheme | None
) -> str | None:
    """Say why no server takes some layers with rounded inputs, and what it would take instead; None where one does.

    Args:
        layers: The layers that are quantized.
        schemes: Every scheme that each of them may get, by module name.
        inputs: Grid of their inputs; None where they stay as they are.
    """
    if inputs is None or inputs.is_static:  # no server takes static inputs of any layer, which is a note
        return None
    refuse = _float_refusal if inputs.type == "float" else _integer_refusal
    found = (refuse(layer, scheme, inputs) for layer in layers for scheme in schemes[layer.name])
    return next(filter(None, found), None)


def inputs_notes(
    layers: Iterable[LinearLayer], schemes: Mapping[str, Sequence[LayerScheme]], inputs: ActivationScheme | None
) -> list[str]:
    """Say where servers leave inputs in 16 bits that they are told to round, one sentence each.

    Args:
        layers: The layers that are quantized, none of which is refused.
        schemes: Every scheme that each of them may get, by module name.
        inputs: Grid of their inputs; None where they stay as they are.
    """
    if inputs is None:
        return []
    if inputs.is_static:
        return [_STATIC_NOTE.format(inputs.in_words)]
    if inputs.type == "float":
        return list(_float_notes(layers))
    return list(_integer_notes({scheme for possible in schemes.values() for scheme in possible}, inputs))


def _float_refusal(layer: LinearLayer, scheme: LayerScheme, inputs: ActivationScheme) -> str | None:
    if scheme != _FP8_WEIGHTS:
        size, advice = _FP8_WEIGHTS.group_size, "; quantize it so"
        if layer.columns % size:
            advice = (
                f", which do not divide its {layer.columns} inputs; take such weights and quantization.indivisible: "
                "keep, which leaves these layers in 16 bits"
            )
        return (
            f"{layer.name} with {_in_words(scheme)}: vLLM multiplies {inputs.in_words} with symmetric int4 weights in "
            f"groups of {size} alone{advice}, name it in quantization.ignore, or take activations.type: int"
        )
    if experts_of(layer.name) is not None and layer.columns % _FP8_EXPERT_TILE:
        return (
            f"{layer.name} has {layer.columns} inputs: experts with {inputs.in_words} want a multiple of "
            f"{_FP8_EXPERT_TILE} in vLLM; name the experts in quantization.ignore, or take activations.bits: 16"
        )
    return None


def _integer_refusal(layer: LinearLayer, scheme: LayerScheme, inputs: ActivationScheme) -> str | None:
    if experts_of(layer.name) is not None:
        return (
            f"{layer.name} with {inputs.in_words}: vLLM has no kernel for packed experts with integer inputs; name the "
            "experts in quantization.ignore, take activations.bits: 16, or activations.type: float with symmetric int4 "
            "weights in groups of 128"
        )
    if scheme.bits > 4 and inputs.bits == 4:
        return (
            f"{layer.name} with {_in_words(scheme)}: vLLM rounds inputs of such weights to 8 bits, not to 4; take "
            "activations.bits: 8, or weights of at most 4 bits"
        )
    if inputs.bits == 4 and PER_CHANNEL < scheme.group_size < _LEAST_INT4_GROUP:
        return (
            f"{layer.name} with {_in_words(scheme)}: vLLM rounds inputs of such small groups to 8 bits, not to 4; take "
            f"groups of at least {_LEAST_INT4_GROUP}, or group_size: -1"
        )
    if not scheme.symmetric and scheme.bits == inputs.bits:
        return (
            f"{layer.name} with {_in_words(scheme)}: vLLM's kernel for {inputs.in_words} (Humming) refuses asymmetric "
            "weights of the same width; take symmetric: true, or another width"
        )
    return None


def _float_notes(layers: Iterable[LinearLayer]) -> Iterator[str]:
    yield (
        "FP8 inputs: of the servers, vLLM takes them, in bfloat16 on GPUs of compute capability 9.0 (H100, H200), and "
        "refuses the model on others; its kernel (CUTLASS) rounds scales, and their products with integers, to FP8, "
        "which is not measured here"
    )
    outputs: dict[str, int] = defaultdict(int)
    for layer in layers:
        if experts_of(layer.name) is None:
            outputs[fused_name(layer.name) or layer.name] += layer.rows
    ragged = [name for name, rows in outputs.items() if rows % _FP8_TILE]
    if ragged:
        yield (
            f"{len(ragged)} layers whose outputs are no multiple of {_FP8_TILE}: vLLM leaves their inputs in 16 bits, "
            f"the first is {ragged[0]}"
        )


def _integer_notes(schemes: Iterable[LayerScheme], inputs: ActivationScheme) -> Iterator[str]:
    schemes = list(schemes)
    grouped = [scheme for scheme in schemes if scheme.group_size != PER_CHANNEL]
    name = inputs.in_words
    if inputs.bits == 8 and grouped:
        yield (
            f"{name}: vLLM 0.32 leaves inputs in 16 bits where weights have groups, so the model is not faster there, "
            "and no worse than measured here; it rounds them with quantization.group_size: -1, or with "
            "activations.type: float"
        )
    rounded = schemes if inputs.bits == 4 else [scheme for scheme in schemes if scheme not in grouped]
    if not rounded:
        return
    yield (
        f"{name}: of the servers, vLLM rounds inputs so, by its Humming kernels, on GPUs of compute capability "
        + ("7.5 to 8.9; on 9.0 and 12.0 it takes int8" if inputs.bits == 4 else "7.5 to 9.0 and 12.0")
        + ", and on 10.0 it leaves them in 16 bits"
    )
    if any(scheme.bits in _OTHER_KERNELS for scheme in rounded):
        yield (
            f"{name} and weights of 4 or 8 bits: start vLLM with {HUMMING_OPTION}; the kernels that it prefers "
            "(Machete, Marlin and others) leave inputs in 16 bits"
        )


def _in_words(scheme: LayerScheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    size = "one scale a row" if scheme.group_size == PER_CHANNEL else f"groups of {scheme.group_size}"
    return f"{kind} {scheme.bits}-bit weights, {size}"
