"""Mode `sequential` on a worker: a share of a block's Hessians, a tile of its rows, its shard.

Workers hand each other partial sums and solved tiles as files. A share is a fixed part of the calibration chunks and a
tile a fixed part of the rows, so that it does not matter who does which.
"""

import dataclasses
import functools
import json
import time
from typing import Any

import torch

from astro.block import BlockStatistics, by_settings
from astro.checkpoint import load_tensors, read_note, save_tensors
from astro.config import Quantization
from astro.errors import RunError
from astro.grid import Grid
from astro.group import Figures, GroupOutcome, LinearGroup, SolvedRows, prepare_group, solve_rows
from astro.hessian import HessianAccumulator
from astro.layer import QuantizedLinear, merge_rows, row_tiles, stack
from astro.report import LayerRecord
from astro_dist.budget import layer_settings
from astro_dist.plan import BlockUnit
from astro_dist.sequential_schedule import shares
from astro_dist.stage import Stage

__all__ = ["TileSolver"]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some rows of a group: which sums it reads, its members, its rows of their stack."""

    sums: int
    settings: Quantization
    members: tuple[str, ...]
    rows: slice


class TileSolver:
    """The parts of one block that this worker does. Holds at most one prepared group."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._prepared: tuple[tuple[int, tuple[str, ...]], LinearGroup, torch.Tensor] | None = None

    def share(self, index: int, number: int) -> dict[str, Any]:
        """Partial Hessians of a block from one share of the calibration chunks.

        Returns:
            `tiles`: into how many the block's rows are cut.
        """
        stage = self._stage
        start = time.perf_counter()
        unit = stage.load("original", index)
        seconds = {"read": time.perf_counter() - start}
        statistics = BlockStatistics(stage.linears(unit), stage.device)
        for chunk in shares(stage.spec.chunks, stage.spec.shares)[number]:
            hidden = stage.hidden("round-0", index, chunk)
            statistics.run(functools.partial(stage.forward, index, hidden))
        partials = statistics.partials()
        seconds["hessian"] = statistics.seconds
        seconds["forward"] = time.perf_counter() - start - seconds["read"] - seconds["hessian"]
        groups = [names for names, _, _ in partials]
        note = {
            "groups": groups,
            "num_tokens": [count for _, _, count in partials],
            "seconds": seconds,
        }
        sums = {f"sum-{i}": partial for i, (_, partial, _) in enumerate(partials)}
        save_tensors(stage.spec.run.partial(index, f"share-{number}"), sums, json.dumps(note))
        return {"tiles": len(self._tiles(unit, groups))}

    def tile(self, index: int, number: int) -> None:
        """Solve one tile of a block's rows."""
        stage = self._stage
        unit = stage.load("original", index)
        groups, num_tokens = self._read_note(index)
        tile = self._tiles(unit, groups)[number]
        group, W = self._group(unit, tile)
        solved = solve_rows(group, W[tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        note = {**dataclasses.asdict(group.outcome_()), "num_tokens": num_tokens[tile.sums]}
        save_tensors(
            stage.spec.run.partial(index, f"tile-{number}"), tensors | _tensors(solved.figures), json.dumps(note)
        )

    def seconds_of(self, index: int, records: list[LayerRecord]) -> dict[str, float]:
        """Seconds of all workers on a block by phase: what the shares and the solved groups noted."""
        seconds: dict[str, float] = {}
        notes = [note["seconds"] for note in self._read_shares(index)]
        for own in (*notes, *(record.seconds for record in records)):
            for phase, spent in own.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        return seconds

    def merge(self, index: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Every layer of a block and the records of its groups, from the solved tiles."""
        self._prepared = None
        stage = self._stage
        unit = stage.spec.plan.blocks[index]
        groups, _ = self._read_note(index)
        tiles: dict[tuple[str, ...], list[tuple[_Tile, SolvedRows, dict[str, Any]]]] = {}
        for number, tile in enumerate(self._tiles(unit, groups)):
            tiles.setdefault(tile.members, []).append((tile, *self._read_tile(index, number, tile.settings)))
        weights = stage.weights(unit)
        quantized: dict[str, QuantizedLinear] = {}
        records = []
        for members, parts in tiles.items():
            notes = [note for _, _, note in parts]
            num_tokens = notes[0].pop("num_tokens")
            seconds: dict[str, float] = {}
            for note in notes:
                for phase, spent in note["seconds"].items():
                    seconds[phase] = seconds.get(phase, 0.0) + spent
            outcome = GroupOutcome(**{**notes[0], "seconds": seconds})
            group = [(name, weights[name]) for name in members]
            solved = [rows for _, rows, _ in parts]
            layers, record = merge_rows(group, parts[0][0].settings, solved, outcome, num_tokens)
            quantized |= layers
            records.append(record)
        return quantized, records

    def _group(self, unit: BlockUnit, tile: _Tile) -> tuple[LinearGroup, torch.Tensor]:
        """What a tile's group shares, and the stack of its weights; kept, because the next tile may be of it too."""
        key = (unit.index, tile.members)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None
            stage = self._stage
            weights = stage.weights(unit)
            name, W = stack([(member, weights[member]) for member in tile.members])
            H = self._merged(unit.index, tile.sums, name)
            scale_dtype = stage.scale_dtype(unit)
            group = prepare_group(name, W, H, tile.settings, stage.spec.regularization, scale_dtype)
            self._prepared = (key, group, W)
        return self._prepared[1:]

    def _merged(self, index: int, sums: int, name: str) -> torch.Tensor:
        """The Hessian of a group: its shares, summed in their order."""
        stage = self._stage
        total: HessianAccumulator | None = None
        for number in range(len(shares(stage.spec.chunks, stage.spec.shares))):
            tensors, note = load_tensors(stage.spec.run.partial(index, f"share-{number}"))
            partial = tensors[f"sum-{sums}"].to(stage.device)
            if total is None:
                total = HessianAccumulator(len(partial), stage.device)
            total.merge_(partial, json.loads(note)["num_tokens"][sums])
        assert total is not None, "a block has at least one share"
        return total.finish_(name)

    def _tiles(self, unit: BlockUnit, groups: list[list[str]]) -> list[_Tile]:
        settings = layer_settings(self._stage.spec.run, self._stage.spec.quantization, unit, 0)
        rows = {linear.name: self._stage.checkpoint.entries[linear.key].shape[0] for linear in unit.linears}
        return [
            _Tile(sums, own, tuple(members), tile)
            for sums, names in enumerate(groups)
            for own, members in by_settings(names, settings)
            for tile in row_tiles(sum(rows[name] for name in members))
        ]

    def _read_note(self, index: int) -> tuple[list[list[str]], list[int]]:
        """Groups of a block as every share found them, and the tokens of each in all shares."""
        found = self._read_shares(index)
        groups: list[list[str]] = found[0]["groups"]
        if any(note["groups"] != groups for note in found):
            raise RunError(f"block {index}: layers shared their inputs in one share of the chunks, not in another")
        return groups, [sum(counts) for counts in zip(*(note["num_tokens"] for note in found), strict=True)]

    def _read_shares(self, index: int) -> list[dict[str, Any]]:
        """What each share noted beside its sums."""
        count = len(shares(self._stage.spec.chunks, self._stage.spec.shares))
        paths = [self._stage.spec.run.partial(index, f"share-{number}") for number in range(count)]
        return [json.loads(read_note(path)) for path in paths]

    def _read_tile(self, index: int, number: int, settings: Quantization) -> tuple[SolvedRows, dict[str, Any]]:
        tensors, note = load_tensors(self._stage.spec.run.partial(index, f"tile-{number}"))
        group_size = tensors["Q"].shape[1] // tensors["scale"].shape[1]
        grid = Grid(tensors["scale"], tensors["zero"], settings.width, group_size, settings.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), json.loads(note)


def _tensors(figures: Figures) -> dict[str, torch.Tensor]:
    return {field.name: getattr(figures, field.name) for field in dataclasses.fields(Figures)}
