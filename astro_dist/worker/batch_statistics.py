"""The statistics of a batch in files: the sums over one share of the calibration chunks, and those over all of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from astro.calibration.drift import DriftAccumulator
from astro.calibration.input_sums import InputSums, RoundingMoments, side_by_side
from astro.calibration.starved_experts import InputStatistics, exhaust
from astro.linalg.batching import stacked, stacked_padded
from astro.linalg.symmetric import packed, unpacked
from astro.model.cache_scales import LargestByModule
from astro.quantization.block import COUNTED
from astro_dist.schedule.names import SUM, share_part
from astro_dist.worker.split_block import BlockInParts

__all__ = ["BatchStatistics", "MergedSums", "merge_share_", "read_sum", "save_share", "save_sum", "save_sums"]

_ROUNDING, _CORRECTION = "rounding_drift", "correction_drift"
"""Names of the drifts from rounding in a file, as sums have them too: for weights, and for corrections."""


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """What calibration learned of the inputs of a batch, over all chunks.

    Attributes:
        H: Weighted mean of x̂x̂ᵀ of each input group, float32 [B, C, C].
        drift: Weighted mean of (x_s − x)x̂ᵀ of each input group, float32 [B, C, C]; None where errors are not
            compensated.
        spread: How far the drifts of the even and the odd shares lie apart, float32 [B, C, C] in the memory of the
            machine, see `InputSums.spread_`; None where it was not just measured.
        fallbacks: Policy that was used for each input group because too few tokens reached it; empty elsewhere.
        rounding: What was learned of how the inputs are rounded; None where they stay as they are.
    """

    H: torch.Tensor
    drift: torch.Tensor | None
    spread: torch.Tensor | None
    fallbacks: tuple[str, ...]
    rounding: RoundingMoments | None


@dataclasses.dataclass(frozen=True)
class MergedSums:
    """What the shares of an input group are added to.

    Attributes:
        sums: Sums over all shares.
        even: Drift over the even shares alone; None where no share of earlier errors is measured.
    """

    sums: InputSums
    even: DriftAccumulator | None


def save_share(
    block: BlockInParts,
    batch: int,
    share: int,
    sums: Sequence[InputSums],
    seconds: Mapping[str, float],
    largest: LargestByModule,
) -> None:
    """Write the sums of a batch's input groups over one share of the chunks.

    Args:
        block: The block.
        batch: Index of the batch.
        share: Index of the share.
        sums: Sums of each input group.
        seconds: Time by phase that the share took.
        largest: Largest keys and values in the share.
    """
    tensors = {"hessian": stacked([packed(each.hessian.partial) for each in sums])}
    for name, drifts in (
        ("drift", [each.drift for each in sums]),
        (_ROUNDING, [each.rounding_drift for each in sums]),
        (_CORRECTION, [each.correction_drift for each in sums]),
    ):
        partial = [drift.partial for drift in drifts if drift is not None]
        tensors |= {name: stacked(partial)} if partial else {}
    note = {
        "num_tokens": [each.num_tokens for each in sums],
        "totals": [each.hessian.totals.tolist() for each in sums],
        "seconds": seconds,
        "largest": largest.to_json(),
    }
    samples = [each.sample for each in sums if each.sample is not None]
    rows = stacked_padded([sample.rows for sample in samples], 2 * block.columns(batch))
    if rows is not None:
        tensors["sample"] = rows
        note["sampled"] = [len(sample.rows) for sample in samples]
    block.save(batch, share_part(share), tensors, note)


def merge_share_(
    part: tuple[Mapping[str, torch.Tensor], Any],
    columns: int,
    is_even: bool,
    merged: Sequence[MergedSums],
    device: torch.device,
) -> dict[str, float]:
    """Add a share to what the shares before it add up to.

    Args:
        part: Tensors and note of the share, as `BlockInParts.load` returns them.
        columns: Width of the inputs of the batch.
        is_even: Whether the index of the share is even.
        merged: What the share is added to, of each input group.
        device: Device of the sums.

    Returns:
        The time by phase that the share took, in seconds.
    """
    tensors, note = part
    for i, of_group in enumerate(merged):
        sums, totals = of_group.sums, note["totals"][i]
        sums.hessian.merge_(unpacked(tensors["hessian"][i].to(device), columns), note["num_tokens"][i], totals)
        if sums.sample is not None:
            sums.sample.merge_(tensors["sample"][i, : note["sampled"][i]].to(device))
        for of_rounding, name in ((sums.rounding_drift, _ROUNDING), (sums.correction_drift, _CORRECTION)):
            if of_rounding is not None:
                of_rounding.merge_(tensors[name][i].to(device), totals[0])
        if sums.drift is not None:
            of_share = tensors["drift"][i].to(device)
            sums.drift.merge_(of_share, totals[0])
            if of_group.even is not None and is_even:
                of_group.even.merge_(of_share, totals[0])
            del of_share  # before the next one is there
    seconds: dict[str, float] = note["seconds"]
    return seconds


def save_sum(
    block: BlockInParts,
    batch: int,
    statistics: Sequence[InputStatistics],
    seconds: Mapping[str, float],
    largest: LargestByModule,
) -> BatchStatistics:
    """Write the statistics of a batch's input groups.

    Args:
        block: The block.
        batch: Index of the batch.
        statistics: Statistics of each input group.
        seconds: Time by phase that they took.
        largest: Largest keys and values.

    Returns:
        The statistics side by side.
    """
    H, columns = stacked([inputs.H for inputs in statistics]), block.columns(batch)
    drift = stacked_padded([inputs.drift for inputs in statistics], columns)
    rounding = side_by_side([inputs.rounding for inputs in statistics], columns)
    tensors = {"hessian": packed(H)} | ({"drift": drift} if drift is not None else {})
    if rounding is not None:
        drifts = {_ROUNDING: rounding.drift, _CORRECTION: rounding.correction_drift}
        tensors |= {"sample": rounding.sample} | {name: each for name, each in drifts.items() if each is not None}
    note: dict[str, Any] = {
        "num_tokens": [inputs.num_tokens for inputs in statistics],
        **{figure: [getattr(inputs, figure) for inputs in statistics] for figure in COUNTED},
        "seconds": seconds,
        "largest": largest.to_json(),
    }
    block.save(batch, SUM, tensors, note)
    return BatchStatistics(H, drift, None, tuple(note["fallback"]), rounding)


def save_sums(
    block: BlockInParts,
    statistics: Iterable[InputStatistics],
    seconds: Mapping[str, float],
    largest: LargestByModule,
) -> None:
    """Write the statistics of all batches of a block that a worker fed.

    Args:
        block: The block, all of its input groups in one stage.
        statistics: Statistics of every input group in order, which are finished here.
        seconds: Time by phase that was spent on the block so far.
        largest: Largest keys and values.
    """
    remaining = iter(statistics)
    for batch, input_groups in enumerate(block.batches):
        finished = [next(remaining) for _ in input_groups]
        save_sum(block, batch, finished, {} if batch else seconds, largest)
        finished.clear()
    exhaust(remaining)


def read_sum(block: BlockInParts, batch: int, device: torch.device) -> BatchStatistics:
    """Read the statistics of a batch, as they were written.

    Args:
        block: The block.
        batch: Index of the batch.
        device: Device that unpacks Hessians.

    Raises:
        DamagedError: The part is missing, or not as it was written.
    """
    tensors, note = block.load(batch, SUM)
    H = unpacked(tensors["hessian"].to(device), block.columns(batch))
    sample = tensors.get("sample")
    drifts = tensors.get(_ROUNDING), tensors.get(_CORRECTION)
    rounding = None if sample is None else RoundingMoments(sample, *drifts)
    return BatchStatistics(H, tensors.get("drift"), None, tuple(note["fallback"]), rounding)
