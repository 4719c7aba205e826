"""The clips that training learned for the inputs of layers, put into the plan of a run."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

from astro.activation_config import Activations
from astro.errors import CheckpointError, ConfigError
from astro.model.clipped_rounding import InputClips
from astro.model.clips_file import CLIPS_FILE, StoredClips, read_clips
from astro.model.linear_layer import LinearLayer
from astro.storage.byte_store import Store
from astro_dist.config.schema import RunConfig
from astro_dist.planning.units import Plan

__all__ = ["clips_sha256", "settle_compensation", "with_clips"]


def with_clips(plan: Plan, store: Store, activations: Activations) -> tuple[Plan, list[str]]:
    """Give the quantized layers of a plan the learned clips of their inputs, if the configuration asks for them.

    Args:
        plan: Units of the run.
        store: Files of the source.
        activations: Settings of what servers do with inputs.

    Returns:
        The plan with the clips, and sentences that the user should read before the run starts.

    Raises:
        ConfigError: The source has no clips, or they were learned for another width.
        CheckpointError: The file of the clips is damaged, a quantized layer has none, or its clips are no range.
    """
    if not activations.has_clips:
        return plan, []
    path = f"{store}/{CLIPS_FILE}"
    if CLIPS_FILE not in store.sizes():
        raise ConfigError(
            f"activations.clips: from-checkpoint: {path} is not there; `astro-dist train` writes it beside the "
            "weights. For another model take activations.clips: none, which gives each token a scale"
        )
    stored = read_clips(store, CLIPS_FILE)
    if stored.bits != activations.bits:
        can_be_set = stored.bits in (4, 8)
        raise ConfigError(
            f"activations.bits: {activations.bits}, but the clips in {path} were learned for {stored.bits} bits; "
            + (f"set activations.bits: {stored.bits}" if can_be_set else "train with input_bits: 4 or 8, or take none")
        )
    linears = [linear for unit in plan.blocks for linear in unit.linears]
    _require_clips(linears, stored, path)
    blocks = tuple(
        dataclasses.replace(unit, linears=tuple(_with_clips(linear, stored, path) for linear in unit.linears))
        for unit in plan.blocks
    )
    return dataclasses.replace(plan, blocks=blocks), list(_notes(linears, stored))


def settle_compensation(config: RunConfig) -> RunConfig:
    """Settle that weights make up for no errors of inputs where these are rounded between learned clips.

    Such weights were trained for rounded inputs. Calibration compares with the source as if none were rounded, and
    what training learned to do with them would be taken for an error. A share that the user gives stays.

    Args:
        config: Configuration of the run.
    """
    if not config.activations.has_clips or config.quantization.compensation != "auto":
        return config
    return config.model_copy(update={"quantization": dataclasses.replace(config.quantization, compensation=0.0)})


def clips_sha256(plan: Plan) -> str | None:
    """Return the SHA-256 of all clips of a plan, 64 hexadecimal digits; None where it has none.

    Args:
        plan: Units of the run.
    """
    clips = [(linear.name, linear.clips) for unit in plan.blocks for linear in unit.linears if linear.clips is not None]
    if not clips:
        return None
    lines = (f"{name} {grid.bits} {grid.scale!r} {grid.zero_point!r}\n" for name, grid in clips)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _require_clips(linears: Iterable[LinearLayer], stored: StoredClips, path: str) -> None:
    """Refuse clips that do not cover every quantized layer: how its inputs were rounded would be anyone's guess."""
    lacking = [linear.name for linear in linears if _trained_name(linear) not in stored.by_layer]
    if lacking:
        raise CheckpointError(
            f"{path}: holds the clips of {len(stored.by_layer)} layers, and of {len(lacking)} quantized layers none, "
            f"the first is {lacking[0]}; training left them out (regularization.layers, or experts that share one "
            "parameter). Name them in quantization.ignore, or take activations.clips: none"
        )


def _notes(linears: Sequence[LinearLayer], stored: StoredClips) -> Iterator[str]:
    yield (
        f"activations.clips: {len(linears)} layers round their inputs between clips of their own, so layers that read "
        "one input have a Hessian each, which takes more time and memory than a scale a token"
    )
    yield (
        "activations.clips: the perplexity of the original is that with inputs in 16 bits; training rounded them, so a "
        "result with rounded inputs may have a lower one"
    )
    unused = stored.by_layer.keys() - {_trained_name(linear) for linear in linears}
    if unused:
        yield (
            f"activations.clips: {len(unused)} layers have clips and are not quantized; their inputs stay as they are, "
            f"the first is {min(unused)}"
        )


def _with_clips(linear: LinearLayer, stored: StoredClips, path: str) -> LinearLayer:
    name = _trained_name(linear)
    low, high = stored.by_layer[name].tolist()
    try:
        return dataclasses.replace(linear, clips=InputClips.between(low, high, stored.bits))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {name}: {error}; train the model again") from error


def _trained_name(linear: LinearLayer) -> str:
    """Name of a layer in the model that was trained; that of a parameter of experts names no layer there."""
    return linear.parameter.removesuffix(".weight")
