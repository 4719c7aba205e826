"""Mode `sequential` on a worker: a share of a layer group's statistics, a tile of its rows, a block's shard.

A block is solved in stages, one for each group of layers that share an input, in the order of its forward: a stage's
inputs already hold the errors of the stages before. Workers hand each other partial sums and solved tiles as files. A
share is a fixed part of the calibration chunks and a tile a fixed part of the rows: it does not matter who does which.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from astro.block import by_settings, input_groups, input_of
from astro.checkpoint import load_tensors, read_note, save_tensors
from astro.config import Quantization
from astro.grid import Grid
from astro.group import Figures, GroupOutcome, LinearGroup, SolvedRows, prepare_group, solve_rows
from astro.hessian import DriftAccumulator, HessianAccumulator
from astro.layer import QuantizedLinear, merge_rows, row_tiles, stack
from astro.report import LayerRecord, add_seconds
from astro_dist.budget import layer_settings
from astro_dist.plan import BlockUnit
from astro_dist.sequential_schedule import shares
from astro_dist.stage import Stage

__all__ = ["TileSolver"]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some rows of layers with one input and one grid: its members, its rows of their stack."""

    settings: Quantization
    members: tuple[str, ...]
    rows: slice


@dataclasses.dataclass
class _Block:
    """What this worker knows of the block it works on."""

    unit: BlockUnit
    groups: list[list[str]]
    weights: dict[str, torch.Tensor]
    solved: dict[int, tuple[dict[str, QuantizedLinear], list[LayerRecord]]]
    prepared: tuple[tuple[str, ...], LinearGroup, torch.Tensor] | None = None


class TileSolver:
    """The parts of one block that this worker does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._block: _Block | None = None

    def share(self, index: int, stage_index: int, number: int) -> dict[str, Any]:
        """Partial sums of a stage from one share of the calibration chunks.

        Returns:
            `stages` of the block, and `tiles`: into how many this stage's rows are cut.
        """
        stage, start = self._stage, time.perf_counter()
        block = self._enter(index)
        first = stage.linears(block.unit)[block.groups[stage_index][0]]
        H = HessianAccumulator(first.in_features, stage.device)
        drift = DriftAccumulator(first.in_features, stage.device) if stage.spec.compensated else None
        quantized = [layers for j in range(stage_index) for layers in self._solved(index, j)[0].items()]
        seconds = {"hessian": 0.0, "compensate": 0.0}
        for chunk in shares(stage.spec.chunks, stage.spec.shares)[number]:
            X = self._input(first, index, "round-0", chunk, quantized)
            _timed(seconds, "hessian", functools.partial(H.add_, X))
            if drift is not None:
                X_source = self._input(first, index, "original", chunk, [])
                _timed(seconds, "compensate", functools.partial(drift.add_, X_source, X))
        sums = {"hessian": H.partial} | ({"drift": drift.partial} if drift is not None else {})
        seconds["forward"] = time.perf_counter() - start - sum(seconds.values())
        note = {"num_tokens": H.num_tokens, "seconds": seconds}
        save_tensors(self._share_path(index, stage_index, number), sums, json.dumps(note))
        return {"stages": len(block.groups), "tiles": len(self._tiles(block, stage_index))}

    def tile(self, index: int, stage_index: int, number: int) -> None:
        """Solve one tile of a stage's rows."""
        block = self._enter(index)
        tile = self._tiles(block, stage_index)[number]
        group, W = self._group(block, stage_index, tile)
        solved = solve_rows(group, W[tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        path = self._tile_path(index, stage_index, number)
        save_tensors(path, tensors, json.dumps(dataclasses.asdict(group.outcome_())))

    def merge(self, index: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord], dict[str, float]]:
        """Every layer of a block, the records of its groups, the seconds that the shares took by phase."""
        block = self._enter(index)
        parts = [self._solved(index, stage_index) for stage_index in range(len(block.groups))]
        seconds: dict[str, float] = {}
        for stage_index in range(len(block.groups)):
            for note in self._share_notes(index, stage_index):
                add_seconds(seconds, note["seconds"])
        layers = {name: layer for quantized, _ in parts for name, layer in quantized.items()}
        records = [record for _, own in parts for record in own]
        self._block = None
        return layers, records, seconds

    def _enter(self, index: int) -> _Block:
        """Load a block of the source and find which of its layers share an input."""
        stage = self._stage
        unit = stage.load("original", index)
        if self._block is None or self._block.unit.index != index:
            hidden = stage.hidden("round-0", index, shares(stage.spec.chunks, stage.spec.shares)[0][0])
            groups = input_groups(stage.linears(unit), lambda: stage.forward(index, hidden))
            self._block = _Block(unit, groups, stage.weights(unit), {})
        return self._block

    def _input(
        self, linear: torch.nn.Linear, index: int, stream: str, chunk: str, quantized: list[tuple[str, QuantizedLinear]]
    ) -> torch.Tensor:
        """What a layer reads of one chunk, with some layers of the block as they were quantized."""
        stage = self._stage
        modules = stage.linears(stage.spec.plan.blocks[index])
        kept = {name: modules[name].weight.data for name, _ in quantized}
        for name, layer in quantized:
            modules[name].weight.data = layer.dequantize().to(stage.device, stage.spec.compute_dtype)
        try:
            hidden = stage.hidden(stream, index, chunk)
            return input_of(linear, lambda: stage.forward(index, hidden))
        finally:
            for name, weight in kept.items():
                modules[name].weight.data = weight

    def _group(self, block: _Block, stage_index: int, tile: _Tile) -> tuple[LinearGroup, torch.Tensor]:
        """What a tile's group shares, and the stack of its weights; kept, because the next tile may be of it too."""
        if block.prepared is None or block.prepared[0] != tile.members:
            block.prepared = None
            stage, index = self._stage, block.unit.index
            name, W = stack([(member, block.weights[member]) for member in tile.members])
            H = HessianAccumulator(W.shape[1], stage.device)
            drift = DriftAccumulator(W.shape[1], stage.device) if stage.spec.compensated else None
            for number in range(len(shares(stage.spec.chunks, stage.spec.shares))):
                tensors, note = load_tensors(self._share_path(index, stage_index, number))
                count = json.loads(note)["num_tokens"]
                H.merge_(tensors["hessian"].to(stage.device), count)
                if drift is not None:
                    drift.merge_(tensors["drift"].to(stage.device), count)
            scale_dtype, spec = stage.scale_dtype(block.unit), stage.spec
            mean_drift = drift.finish_() if drift is not None else None
            group = prepare_group(name, W, H.finish_(name), tile.settings, spec.regularization, scale_dtype, mean_drift)
            block.prepared = (tile.members, group, W)
        return block.prepared[1:]

    def _solved(self, index: int, stage_index: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Layers and records of a stage whose tiles are all solved."""
        block = self._enter(index)
        if stage_index not in block.solved:
            num_tokens = sum(note["num_tokens"] for note in self._share_notes(index, stage_index))
            parts: dict[tuple[str, ...], list[tuple[_Tile, SolvedRows, GroupOutcome]]] = {}
            for number, tile in enumerate(self._tiles(block, stage_index)):
                solved, outcome = self._read_tile(index, stage_index, number, tile.settings)
                parts.setdefault(tile.members, []).append((tile, solved, outcome))
            layers: dict[str, QuantizedLinear] = {}
            records = []
            for members, tiles in parts.items():
                weights = [(name, block.weights[name]) for name in members]
                outcome = _together([outcome for _, _, outcome in tiles])
                solved_rows = [rows for _, rows, _ in tiles]
                quantized, record = merge_rows(weights, tiles[0][0].settings, solved_rows, outcome, num_tokens)
                layers |= quantized
                records.append(record)
            block.solved[stage_index] = (layers, records)
        return block.solved[stage_index]

    def _tiles(self, block: _Block, stage_index: int) -> list[_Tile]:
        spec = self._stage.spec
        settings = layer_settings(spec.run, spec.quantization, block.unit, 0)
        return [
            _Tile(own, tuple(members), tile)
            for own, members in by_settings(block.groups[stage_index], settings)
            for tile in row_tiles(sum(len(block.weights[name]) for name in members))
        ]

    def _share_notes(self, index: int, stage_index: int) -> list[dict[str, Any]]:
        count = len(shares(self._stage.spec.chunks, self._stage.spec.shares))
        paths = [self._share_path(index, stage_index, number) for number in range(count)]
        return [json.loads(read_note(path)) for path in paths]

    def _read_tile(
        self, index: int, stage_index: int, number: int, settings: Quantization
    ) -> tuple[SolvedRows, GroupOutcome]:
        tensors, note = load_tensors(self._tile_path(index, stage_index, number))
        group_size = settings.columns_per_group(tensors["Q"].shape[1])
        grid = Grid(tensors["scale"], tensors["zero"], settings.width, group_size, settings.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), GroupOutcome(**json.loads(note))

    def _share_path(self, index: int, stage_index: int, number: int) -> Path:
        return self._stage.spec.run.partial(index, f"share-{stage_index}-{number}")

    def _tile_path(self, index: int, stage_index: int, number: int) -> Path:
        return self._stage.spec.run.partial(index, f"tile-{stage_index}-{number}")


def _together(outcomes: list[GroupOutcome]) -> GroupOutcome:
    """What was decided for a group, the same in every tile; the seconds of all."""
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        add_seconds(seconds, outcome.seconds)
    return dataclasses.replace(outcomes[0], seconds=seconds)


def _timed(seconds: dict[str, float], phase: str, action: Callable[[], None]) -> None:
    start = time.perf_counter()
    action()
    seconds[phase] += time.perf_counter() - start
