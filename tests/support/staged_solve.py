"""The calibration and the solve of one stage in mode `stages`, on a fake GPU at true sizes."""

import contextlib
from unittest import mock

import torch

from astro.calibration.input_sums import SumKind
from astro.calibration.stage_statistics import StageStatistics
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts, Quantization, Regularizer, SolverSettings
from astro.model.operands import Inputs, Operand
from astro.quantization.block import quantize_block
from astro.quantization.recipe import Recipe
from tests.support.device_memory import DEVICE, counted_memory

__all__ = ["peaks_of_staged_solve"]

_NAME, _CHUNKS, _TOKENS = "model.layers.0.mlp.down_proj", 3, 64


class _SolvedError(Exception):
    """Ends a solve once all rows are done: what is read of them has no numbers here."""


def peaks_of_staged_solve(rows: int, columns: int, compensation: str | float = "auto") -> tuple[int, int]:
    """Return the most bytes that are held on the device while the inputs of a layer are summed, and while it is solved.

    Args:
        rows: Rows of the layer.
        columns: Columns of the layer.
        compensation: Setting of `quantization.compensation`.
    """
    kind, operand = SumKind(has_drift=compensation != 0), Operand((_NAME,), "", None, columns)
    recipe = Recipe(SolverSettings(compensation=compensation, refine_passes=1), Regularizer(), torch.bfloat16)
    schemes = {_NAME: Quantization().scheme(_NAME, columns)}
    with counted_memory() as memory:
        statistics = StageStatistics([[operand]], DEVICE, TokenWeights("none"), lambda _: kind, compensation == "auto")
        for number in range(_CHUNKS):
            inputs = {operand: Inputs(torch.empty(_TOKENS, columns, dtype=torch.bfloat16, device=DEVICE))}
            statistics.add_(f"c{number:04d}", inputs, inputs)
        del inputs
        summing = memory.peak
        memory.restart()
        weights = {_NAME: torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)}
        finished = statistics.finish_(Experts(policy="fail"), mock.Mock())
        with (
            mock.patch("astro.quantization.input_group.merge_rows", side_effect=_SolvedError),
            mock.patch("astro.quantization.prepared_groups.InputGroups.outcomes_"),
            contextlib.suppress(_SolvedError),
        ):
            quantize_block(weights, [[_NAME]], finished, schemes, recipe)
    return summing, memory.peak
