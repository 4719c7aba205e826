"""What a worker does of a block that several work on: a share of a layer group's statistics, a tile of its rows, or
of the sample that its β is searched on.

A block is solved in stages, one for each group of layers that share an input. In mode `sequential` they follow the
block's forward, and a stage's inputs already hold the errors of the stages before; in mode `blocks` one worker gives
out the sums of all stages, which wait for nothing. Workers hand each other sums, decisions, the errors of the sample
under every β, and solved tiles as files.
A share is a fixed part of the calibration chunks and a tile one of the rows: it does not matter who does which.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro import beta
from astro.block import BlockStatistics, by_settings, input_groups, input_of
from astro.config import Quantization
from astro.errors import RunError
from astro.grid import Grid
from astro.group import Figures, GroupOutcome, LinearGroup, SolvedRows, measure_width, prepare_group, solve_rows
from astro.hessian import DriftAccumulator, HessianAccumulator
from astro.layer import QuantizedLinear, merge_rows, stack
from astro.parts import load_part, read_part_note, save_part
from astro.report import LayerRecord, add_seconds, timed
from astro.tiling import row_tiles
from astro_dist.budget import layer_settings
from astro_dist.plan import BlockUnit
from astro_dist.sequential_schedule import shares
from astro_dist.stage import Stage

__all__ = ["TileSolver"]


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some rows of layers with one input and one grid: its members, its rows of their stack or of their sample."""

    settings: Quantization
    members: tuple[str, ...]
    rows: slice


@dataclasses.dataclass
class _Block:
    """What this worker knows of the block it works on, in one round."""

    round_index: int
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
            `stages` of the block, and `parts` of this one: see `_parts`.
        """
        stage, start = self._stage, time.perf_counter()
        chunks = shares(stage.spec.chunks, stage.spec.shares)[number]
        block = self._enter(0, index, chunks[0])
        name = block.groups[stage_index][0]
        H, drift = self._accumulators(block, stage_index)
        quantized = self._dequantized(index, stage_index)
        seconds = {"hessian": 0.0, "compensate": 0.0}
        for chunk in chunks:
            X = self._input(name, index, "round-0", chunk, quantized)
            with timed(seconds, "hessian"):
                H.add_(X)
            if drift is not None:
                X_source = self._input(name, index, "original", chunk, {})
                with timed(seconds, "compensate"):
                    drift.add_(X_source, X)
        sums = {"hessian": H.partial} | ({"drift": drift.partial} if drift is not None else {})
        seconds["forward"] = time.perf_counter() - start - sum(seconds.values())
        note = {"groups": block.groups, "num_tokens": H.num_tokens, "seconds": seconds}
        save_part(self._path(block, stage_index, f"share-{number}"), sums, json.dumps(note))
        return {"stages": len(block.groups), "parts": self._parts(block, stage_index)}

    def forget(self) -> None:
        """Let go of the block, of its Hessians and factors: something else needs the memory."""
        self._block = None

    def give_out(
        self, round_index: int, unit: BlockUnit, statistics: BlockStatistics, seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Hand on the sums of all stages of a block that this worker fed.

        Args:
            round_index: of the run.
            unit: the block.
            statistics: whose sums are finished here.
            seconds: that were spent on the block so far, by phase.

        Returns:
            `stages`: each with its parts, see `_parts`; the stage with the widest input first.
        """
        block = _Block(round_index, unit, statistics.groups, {}, {})
        columns = []
        for stage_index, (_, H, num_tokens) in enumerate(statistics.finish_()):
            note = {"groups": block.groups, "num_tokens": num_tokens, "seconds": {} if stage_index else dict(seconds)}
            save_part(self._path(block, stage_index, "sum"), {"hessian": H}, json.dumps(note))
            columns.append(len(H))
        widest = sorted(range(len(columns)), key=lambda stage_index: -columns[stage_index])
        return {"stages": [(stage_index, self._parts(block, stage_index)) for stage_index in widest]}

    def decide(self, round_index: int, index: int, stage_index: int) -> None:
        """Add up a stage's shares, where it has any, in their order; see that it can be solved, and measure widths."""
        block = self._enter(round_index, index)
        sums = self._sums(block, stage_index)
        width_errors, seconds = {}, dict[str, float]()
        for settings, members in by_settings(block.groups[stage_index], self._settings(block)):
            group, W = self._prepare_(block, settings, tuple(members), sums)
            width_errors["+".join(members)] = {
                bits: measure_width(group, W, bits) for bits in self._stage.widths(round_index)
            }
            add_seconds(seconds, group.spent_())
        content = {"width_errors": width_errors, "seconds": seconds}
        save_part(self._path(block, stage_index, "decision"), {}, json.dumps(content))

    def weigh(self, round_index: int, index: int, stage_index: int, number: int) -> None:
        """Try every β on one tile of a stage's sampled rows."""
        block = self._enter(round_index, index)
        tile = self._sample_tiles(block, stage_index)[number]
        group, W = self._prepared(block, stage_index, tile)
        errors = beta.weigh(group, W, tile.rows)
        note = json.dumps({"seconds": group.spent_()})
        save_part(self._path(block, stage_index, f"sample-{number}"), {"errors": errors}, note)

    def tile(self, round_index: int, index: int, stage_index: int, number: int) -> None:
        """Solve one tile of a stage's rows."""
        block = self._enter(round_index, index)
        tile = self._tiles(block, stage_index)[number]
        group, W = self._prepared(block, stage_index, tile)
        if group.beta is None:
            group = beta.choose(group, self._sample_errors(block, stage_index, tile.members))
            block.prepared = (tile.members, group, W)
        solved = solve_rows(group, W[tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        path = self._path(block, stage_index, f"tile-{number}")
        save_part(path, tensors, json.dumps(dataclasses.asdict(group.outcome_())))

    def merge(
        self, round_index: int, index: int
    ) -> tuple[dict[str, QuantizedLinear], list[LayerRecord], dict[str, float]]:
        """Every layer of a block, the records of its groups, the seconds that all but the tiles took by phase."""
        block = self._enter(round_index, index)
        seconds: dict[str, float] = {}
        layers: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for stage_index in range(len(block.groups)):
            samples = [f"sample-{number}" for number in range(len(self._sample_tiles(block, stage_index)))]
            for part in ("sum", "decision", *samples):
                add_seconds(seconds, self._note(block, stage_index, part)["seconds"])
            solved, own = self._solved(block, stage_index)
            layers |= solved
            records += own
        self._block = None
        return layers, records, seconds

    def _enter(self, round_index: int, index: int, chunk: str | None = None) -> _Block:
        """Load a block of the source; which of its layers share an input is found with a chunk, or was noted."""
        stage = self._stage
        if self._block is None or (self._block.round_index, self._block.unit.index) != (round_index, index):
            self.forget()
        unit = stage.load("original", index)
        if self._block is None:
            self._block = _Block(round_index, unit, [], stage.weights(unit), {})
            if chunk is not None:
                hidden = stage.hidden("round-0", index, chunk)
                self._block.groups += input_groups(stage.linears(unit), lambda: stage.forward(index, hidden))
            else:
                first = "sum" if self._is_there(self._block, 0, "sum") else "share-0"
                self._block.groups += self._note(self._block, 0, first)["groups"]
        return self._block

    def _input(
        self, name: str, index: int, stream: str, chunk: str, weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """What a layer reads of one chunk, with other weights in some layers of the block."""
        stage = self._stage
        modules = stage.linears(stage.spec.plan.blocks[index])
        kept = {other: modules[other].weight.data for other in weights}
        for other, weight in weights.items():
            modules[other].weight.data = weight
        try:
            hidden = stage.hidden(stream, index, chunk)
            return input_of(name, modules[name], lambda: stage.forward(index, hidden))
        finally:
            for other, weight in kept.items():
                modules[other].weight.data = weight

    def _accumulators(self, block: _Block, stage_index: int) -> tuple[HessianAccumulator, DriftAccumulator | None]:
        """Empty sums for a stage; the drift's only where errors are compensated."""
        stage = self._stage
        columns = stage.linears(block.unit)[block.groups[stage_index][0]].in_features
        drift = DriftAccumulator(columns, stage.device) if stage.spec.quantization.compensates else None
        return HessianAccumulator(columns, stage.device), drift

    def _sums(self, block: _Block, stage_index: int) -> dict[str, torch.Tensor]:
        """A stage's sums, as they were given out, or from its shares."""
        path = self._path(block, stage_index, "sum")
        if self._is_there(block, stage_index, "sum"):
            return load_part(path)[0]
        stage, name = self._stage, "+".join(block.groups[stage_index])
        H, drift = self._accumulators(block, stage_index)
        seconds: dict[str, float] = {}
        for number in range(len(shares(stage.spec.chunks, stage.spec.shares))):
            tensors, text = load_part(self._path(block, stage_index, f"share-{number}"))
            note = json.loads(text)
            add_seconds(seconds, note["seconds"])
            H.merge_(tensors["hessian"].to(stage.device), note["num_tokens"])
            if drift is not None:
                drift.merge_(tensors["drift"].to(stage.device), note["num_tokens"])
        sums = {"hessian": H.finish_(name)} | ({"drift": drift.finish_(name)} if drift is not None else {})
        content = {"groups": block.groups, "num_tokens": H.num_tokens, "seconds": seconds}
        save_part(path, sums, json.dumps(content))
        return sums

    def _dequantized(self, index: int, stage_index: int) -> dict[str, torch.Tensor]:
        """Weights of the stages before as they were quantized, in the compute dtype."""
        block = self._enter(0, index)
        solved = [self._solved(block, before)[0] for before in range(stage_index)]
        dtype, device = self._stage.spec.compute_dtype, self._stage.device
        return {name: layer.dequantize().to(device, dtype) for layers in solved for name, layer in layers.items()}

    def _prepared(self, block: _Block, stage_index: int, tile: _Tile) -> tuple[LinearGroup, torch.Tensor]:
        """What a tile's group shares, and the stack of its weights: at hand from the call before, or from its sums."""
        if block.prepared is None or block.prepared[0] != tile.members:
            sums, _ = load_part(self._path(block, stage_index, "sum"))
            return self._prepare_(block, tile.settings, tile.members, sums)
        return block.prepared[1:]

    def _prepare_(
        self, block: _Block, settings: Quantization, members: tuple[str, ...], sums: Mapping[str, torch.Tensor]
    ) -> tuple[LinearGroup, torch.Tensor]:
        """What a group's rows share, and the stack of its weights; kept for the next call."""
        stage = self._stage
        block.prepared = None  # makes room
        name, W = stack([(member, block.weights[member]) for member in members])
        H, drift = sums["hessian"].to(stage.device), sums.get("drift")
        drift = drift.to(stage.device) if drift is not None else None
        regularization, scale_dtype = stage.spec.regularization, stage.scale_dtype(block.unit)
        group = prepare_group(name, W, H, settings, regularization, scale_dtype, drift)
        block.prepared = (members, group, W)
        return group, W

    def _solved(self, block: _Block, stage_index: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Layers and records of a stage whose tiles are all solved."""
        if stage_index not in block.solved:
            num_tokens = self._note(block, stage_index, "sum")["num_tokens"]
            parts: dict[tuple[str, ...], list[tuple[_Tile, SolvedRows, GroupOutcome]]] = {}
            for number, tile in enumerate(self._tiles(block, stage_index)):
                solved, outcome = self._read_tile(block, stage_index, number, tile.settings)
                parts.setdefault(tile.members, []).append((tile, solved, outcome))
            layers: dict[str, QuantizedLinear] = {}
            records = []
            for members, tiles in parts.items():
                weights = [(name, block.weights[name]) for name in members]
                outcome = _together("+".join(members), [outcome for _, _, outcome in tiles])
                solved_rows = [rows for _, rows, _ in tiles]
                quantized, record = merge_rows(weights, tiles[0][0].settings, solved_rows, outcome, num_tokens)
                layers |= quantized
                noted = self._note(block, stage_index, "decision")["width_errors"]["+".join(members)]
                errors = {int(bits): error for bits, error in noted.items()}
                records.append(dataclasses.replace(record, width_errors=errors))
            block.solved[stage_index] = (layers, records)
        return block.solved[stage_index]

    def _settings(self, block: _Block) -> dict[str, Quantization]:
        return layer_settings(self._stage.spec.run, self._stage.spec.quantization, block.unit, block.round_index)

    def _parts(self, block: _Block, stage_index: int) -> dict[str, int]:
        """Calls that a stage takes after its decision, by method: all of one are done before the next begins."""
        return {"weigh": len(self._sample_tiles(block, stage_index)), "tile": len(self._tiles(block, stage_index))}

    def _tiles(self, block: _Block, stage_index: int) -> list[_Tile]:
        """Of all rows."""
        return self._cut(block, stage_index, row_tiles)

    def _sample_tiles(self, block: _Block, stage_index: int) -> list[_Tile]:
        """Of the sampled rows, where β is searched."""
        is_searched = self._stage.spec.regularization.is_searched
        return self._cut(block, stage_index, beta.sample_tiles) if is_searched else []

    def _cut(self, block: _Block, stage_index: int, tiles: Callable[[int, int, str], list[slice]]) -> list[_Tile]:
        cut = []
        for settings, members in by_settings(block.groups[stage_index], self._settings(block)):
            shapes = [linear for linear in block.unit.linears if linear.name in members]
            num_rows = sum(linear.rows for linear in shapes)
            rows = tiles(num_rows, shapes[0].columns, self._stage.device.type)
            cut += [_Tile(settings, tuple(members), own) for own in rows]
        return cut

    def _read_tile(
        self, block: _Block, stage_index: int, number: int, settings: Quantization
    ) -> tuple[SolvedRows, GroupOutcome]:
        tensors, note = load_part(self._path(block, stage_index, f"tile-{number}"))
        group_size = settings.columns_per_group(tensors["Q"].shape[1])
        grid = Grid(tensors["scale"], tensors["zero"], settings.width, group_size, settings.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), GroupOutcome(**json.loads(note))

    def _sample_errors(self, block: _Block, stage_index: int, members: Sequence[str]) -> torch.Tensor:
        """Errors of some layers' sampled rows under every β."""
        tiles = enumerate(self._sample_tiles(block, stage_index))
        paths = [self._path(block, stage_index, f"sample-{n}") for n, tile in tiles if tile.members == members]
        return torch.cat([load_part(path)[0]["errors"] for path in paths], dim=1).to(self._stage.device)

    def _note(self, block: _Block, stage_index: int, name: str) -> dict[str, Any]:
        """What is noted with a part of a stage."""
        note: dict[str, Any] = json.loads(read_part_note(self._path(block, stage_index, name)))
        return note

    def _is_there(self, block: _Block, stage_index: int, name: str) -> bool:
        """Lists the folder, as `RunDirectory.present` does, because another machine may be yet to write the file."""
        path = self._path(block, stage_index, name)
        return path in path.parent.glob("*")

    def _path(self, block: _Block, stage_index: int, name: str) -> Path:
        return self._stage.spec.run.partial(block.round_index, block.unit.index, f"{stage_index}-{name}")


def _together(name: str, outcomes: list[GroupOutcome]) -> GroupOutcome:
    """What was decided for a group, the same in every tile; the seconds of all.

    Raises:
        RunError: tiles were damped differently, as other hardware may do.
    """
    decided = sorted({(outcome.damping, outcome.beta) for outcome in outcomes})
    if len(decided) > 1:
        raise RunError(
            f"{name}: workers came to different dampings and betas from one Hessian: {decided}; use one kind of device"
        )
    seconds: dict[str, float] = {}
    for outcome in outcomes:
        add_seconds(seconds, outcome.seconds)
    return dataclasses.replace(outcomes[0], seconds=seconds)
