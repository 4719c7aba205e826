"""The calls by which workers solve one input group in mode `sequential`, on a fake GPU at true sizes.

    python -m tests.support.sequential_solve 16384 53248

prints the most memory that each call holds, in multiples of a matrix of columns × columns of float32 and in GB.
"""

import contextlib
import dataclasses
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from astro.activation_config import Activations, ActivationScheme, Reconstruction
from astro.calibration.input_sums import SumKind
from astro.config import Experts, Quantization, Regularizer, SolverSettings
from astro.linalg.tiling import TILE_ELEMENTS, row_tiles
from astro.model.operands import Operand
from astro.quantization.beta_search import sample_tiles
from astro.quantization.grid import Grid, QuantizedLinear
from astro.quantization.recipe import Corrections, Recipe
from astro_dist.schedule.calls import MergeHessians, PartCall, Reconstruct, SolveRows, TryBetas
from astro_dist.schedule.names import SUM
from astro_dist.worker import split_solver, summed_inputs
from astro_dist.worker.split_block import Tile
from astro_dist.worker.split_solver import SplitSolver
from tests.support.device_memory import DEVICE, counted_memory

__all__ = ["peaks_of_sequential_solve"]

_NAME = "model.layers.0.mlp.down_proj"
_SHARES = 4


class _Parts:
    """The files of one input group of one layer, which are made of nothing when they are read."""

    def __init__(self, rows: int, columns: int, compensates: bool, kind: SumKind) -> None:
        self.batches, self.unit, self.round_index = [[[_NAME]]], SimpleNamespace(index=0), 0
        self._rows, self._columns = rows, columns
        self._compensates, self._kind = compensates, kind
        self._scheme = Quantization().scheme(_NAME, columns)
        self._written: set[str] = set()

    def columns(self, batch: int) -> int:
        return self._columns

    def tiles(self, batch: int) -> list[Tile]:
        return [
            Tile(self._scheme, ((_NAME,),), rows)
            for rows in row_tiles(self._rows, self._columns, TILE_ELEMENTS["cuda"], 1)
        ]

    def sample_tiles(self, batch: int) -> list[Tile]:
        return [
            Tile(self._scheme, ((_NAME,),), rows)
            for rows in sample_tiles(self._rows, self._columns, TILE_ELEMENTS["cuda"], 1)
        ]

    def members(self, tile: Tile) -> list[list[tuple[str, int]]]:
        return [[(_NAME, self._rows)]]

    def rounded(self, batch: int) -> tuple[dict[str, QuantizedLinear], list[Any]]:
        shape = (self._rows, self._columns // self._scheme.group_size)
        grid = Grid(torch.empty(shape), torch.empty(shape), self._scheme.bits, self._scheme.group_size, True)
        return {_NAME: QuantizedLinear(torch.empty(self._rows, self._columns, dtype=torch.int8), grid)}, []

    def save_corrections(self, batch: int, corrected: Any) -> None:
        assert corrected[0].corrections

    def is_there(self, batch: int, part: str) -> bool:
        return part != SUM

    def save(self, batch: int, part: str, tensors: Any, note: Any) -> None:
        for tensor in tensors.values():
            tensor.cpu()

    def note(self, batch: int, part: str) -> Any:
        return {"compensation": {_NAME: 0.5}}

    def load(self, batch: int, part: str) -> tuple[dict[str, torch.Tensor], Any]:
        C = self._columns
        packed = sum(256 * (C - start) for start in range(0, C, 256))
        tensors = {"hessian": torch.empty(1, packed)} | ({"drift": torch.empty(1, C, C)} if self._compensates else {})
        if self._kind.grid is not None:
            tensors |= {"sample": torch.empty(1, 8, 2 * C)}
            corrects = self._kind.has_correction_drift
            tensors |= {"rounding_drift": torch.empty(1, C, C)} if self._compensates or corrects else {}
            tensors |= {"correction_drift": torch.empty(1, C, C)} if corrects else {}
        if "sample" in part:
            tile = self.sample_tiles(batch)[0].rows
            return {"errors": torch.empty(1, 5, tile.stop - tile.start)}, {}
        note = {"num_tokens": [65536], "totals": [[1.0, 1.0, 1.0]], "seconds": {}, "fallback": [""]}
        note |= {"sampled": [8], "sampled_weights": [1.0]}
        return tensors, note


def peaks_of_sequential_solve(
    rows: int,
    columns: int,
    compensation: str | float = "auto",
    rank: int = 0,
    scheme: ActivationScheme | None = None,
) -> dict[str, int]:
    """Return the most bytes that each call holds on the device, by its name.

    Args:
        rows: Rows of the layer.
        columns: Columns of the layer.
        compensation: Setting of `quantization.compensation`.
        rank: Rank of a correction of low rank, which is then computed alone, the rows being solved; 0 for the solve.
        scheme: Grid of the layer's inputs; None where they stay as they are.
    """
    settings = SolverSettings(compensation=compensation, refine_passes=1)  # more take time, and no memory
    quantization = Quantization(compensation=compensation)
    operand = Operand((_NAME,), "", None, columns)
    spec = SimpleNamespace(
        quantization=quantization,
        activations=SimpleNamespace(scheme=scheme, bits=scheme.bits if scheme else 16, rounds_cache=False),
        experts=Experts(), token_weights="none", mode="sequential", shares=_SHARES,
        chunks=tuple(f"c{number:04d}" for number in range(8)),
    )  # fmt: skip
    bits = scheme.bits if scheme else 16
    kind = SumKind(
        scheme,
        has_rounding_drift=quantization.makes_up_for_rounding(bits),
        has_correction_drift=Reconstruction(rank=rank).minds_rounding(Activations(bits=bits)),
    )
    corrections = Corrections(Reconstruction(rank=rank), frozenset([_NAME]), torch.bfloat16) if rank else None
    recipe = Recipe(settings, Regularizer(), torch.bfloat16, corrections=corrections)
    peaks: dict[str, int] = {}
    with counted_memory() as memory:
        device = DEVICE
        runner = SimpleNamespace(
            spec=spec,
            device=device,
            layers=lambda unit: SimpleNamespace(by_name={_NAME: operand}),
            recipe=lambda unit: recipe,
            weights=lambda unit, names: {_NAME: torch.empty(rows, columns, dtype=torch.bfloat16, device=device)},
        )
        solver: Any = SplitSolver(runner)
        block = _Parts(rows, columns, quantization.compensates, kind)
        solver._turn_to = lambda place, chunk=None: block
        patches = [
            mock.patch("astro.quantization.prepared_groups.InputGroups.outcomes_", return_value=[]),
            mock.patch.object(split_solver, "measured_widths", return_value=()),
            mock.patch.object(
                summed_inputs,
                "sum_kind",
                lambda spec, operand, has_drift: dataclasses.replace(kind, has_drift=has_drift),
            ),
        ]
        calls: list[PartCall] = [MergeHessians(0, 0, 0), TryBetas(0, 0, 0, 0), SolveRows(0, 0, 0, 0)]
        if rank:
            calls = [Reconstruct(0, 0, 0)]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            for call in calls:
                memory.restart()
                solver.do(call)
                peaks[call.verb] = memory.peak
    return peaks


if __name__ == "__main__":
    num_rows, num_columns = map(int, sys.argv[1:3])
    square = 4 * num_columns**2
    for verb, peak in peaks_of_sequential_solve(num_rows, num_columns).items():
        print(f"{verb:16} {peak / square:5.2f} squares {peak / 1e9:6.1f} GB")
