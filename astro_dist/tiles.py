"""What a worker does of a block that several work on: a share of a layer group's statistics, a tile of its rows.

A block is solved group by group, each of layers that share an input. In mode `sequential` groups come in stages that
follow the block's forward, and a stage's inputs already hold the errors of the stages before; in mode `blocks` one
worker gives out the sums of all groups, which wait for nothing. Workers hand each other sums, decisions and solved
tiles as files. A share is a fixed part of the calibration chunks and a tile one of the rows: it does not matter who
does which.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro.block import by_settings
from astro.config import Quantization, Regularizer
from astro.errors import RunError
from astro.expert_policy import GroupStatistics, feed_all_tokens, is_starved, rounded, starved_statistics
from astro.grid import Grid
from astro.group import Figures, GroupOutcome, LinearGroup, SolvedRows, measure_width, prepare_group, solve_rows
from astro.hessian import DriftAccumulator, HessianAccumulator
from astro.layer import QuantizedLinear, merge_rows, row_tiles, stack
from astro.observation import Operand
from astro.parts import load_part, read_part_note, save_part
from astro.report import LayerRecord, add_seconds, timed
from astro.statistics import input_stages, inputs_of
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
    """What this worker knows of the block it works on, in one round."""

    round_index: int
    unit: BlockUnit
    groups: list[list[str]]
    stages: list[list[int]]
    weights: dict[str, torch.Tensor]
    solved: dict[int, tuple[dict[str, QuantizedLinear], list[LayerRecord]]]
    prepared: tuple[tuple[str, ...], LinearGroup, torch.Tensor] | None = None


class TileSolver:
    """The parts of one block that this worker does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._block: _Block | None = None

    def share(self, index: int, stage_index: int, number: int) -> dict[str, Any]:
        """Partial sums of a stage's groups from one share of the calibration chunks.

        Returns:
            `stages` of the block, and `tiles`: of each of this stage's groups, into how many its rows are cut.
        """
        stage, start = self._stage, time.perf_counter()
        chunks = shares(stage.spec.chunks, stage.spec.shares)[number]
        block = self._enter(0, index, chunks[0])
        groups = block.stages[stage_index]
        sums = {group: self._accumulators(block, group) for group in groups}
        quantized = self._dequantized(block, stage_index)
        seconds = {"hessian": 0.0, "compensate": 0.0}
        for chunk in chunks:
            inputs = self._inputs(block, groups, "round-0", chunk, quantized)
            drifts = [group for group in groups if sums[group][1] is not None]
            before = self._inputs(block, drifts, "original", chunk, {}) if drifts else {}
            for group, X in inputs.items():
                H, drift = sums[group]
                with timed(seconds, "hessian"):
                    H.add_(X)
                if drift is not None:
                    with timed(seconds, "compensate"):
                        drift.add_(before[group], X)
        seconds["forward"] = time.perf_counter() - start - sum(seconds.values())
        for group, (H, drift) in sums.items():
            tensors = {"hessian": H.partial} | ({"drift": drift.partial} if drift is not None else {})
            note = {**_layout(block), "num_tokens": H.num_tokens, "seconds": seconds if group == groups[0] else {}}
            save_part(self._path(block, group, f"share-{number}"), tensors, json.dumps(note))
        return {
            "stages": len(block.stages),
            "tiles": {group: len(self._tiles(block, group)) for group in groups},
        }

    def forget(self) -> None:
        """Let go of the block, of its Hessians and factors: something else needs the memory."""
        self._block = None

    def give_out(
        self,
        round_index: int,
        unit: BlockUnit,
        groups: Sequence[Sequence[str]],
        statistics: Iterable[GroupStatistics],
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """Hand on the sums of all groups of a block that this worker fed.

        Args:
            round_index: of the run.
            unit: the block.
            groups: names of the layers that share an input.
            statistics: of every group, finished here.
            seconds: that were spent on the block so far, by phase.

        Returns:
            `tiles`: group and number of its tiles, the group with the widest input first.
        """
        block = _Block(round_index, unit, [list(names) for names in groups], [], {}, {})
        columns = []
        for group, known in enumerate(statistics):
            note = {**_layout(block), **_counts(known), "seconds": {} if group else dict(seconds)}
            save_part(self._path(block, group, "sum"), {"hessian": known.H}, json.dumps(note))
            columns.append(len(known.H))
        widest = sorted(range(len(columns)), key=lambda group: -columns[group])
        return {"tiles": [(group, len(self._tiles(block, group))) for group in widest]}

    def decide(self, round_index: int, index: int, group: int) -> None:
        """Decide what holds for all rows of a group; where it has shares, add them up before, in their order."""
        block = self._enter(round_index, index)
        sums, note = self._sums(block, group)
        decided, seconds = {}, dict[str, float]()
        for settings, members in by_settings(block.groups[group], self._settings(block)):
            own = self._rounded(note, settings, self._stage.spec.regularization)
            prepared, W = self._prepare(block, tuple(members), sums, *own)
            errors = {bits: measure_width(prepared, W, bits) for bits in self._stage.widths(round_index)}
            block.prepared = (tuple(members), prepared, W)
            outcome = prepared.outcome_()
            add_seconds(seconds, outcome.seconds)
            decided["+".join(members)] = {"beta": outcome.beta, "gain": outcome.beta_gain, "errors": errors}
        content = {"decided": decided, "seconds": seconds}
        save_part(self._path(block, group, "decision"), {}, json.dumps(content))

    def tile(self, round_index: int, index: int, group: int, number: int) -> None:
        """Solve one tile of a group's rows."""
        block = self._enter(round_index, index)
        tile = self._tiles(block, group)[number]
        if block.prepared is None or block.prepared[0] != tile.members:
            block.prepared = None
            sums, text = load_part(self._path(block, group, "sum"))
            decided = self._decided(block, group, tile.members)
            regularization = dataclasses.replace(self._stage.spec.regularization, beta=decided["beta"])
            own = self._rounded(json.loads(text), tile.settings, regularization)
            prepared, W = self._prepare(block, tile.members, sums, *own)
            block.prepared = (tile.members, dataclasses.replace(prepared, beta_gain=decided["gain"]), W)
        _, prepared, W = block.prepared
        solved = solve_rows(prepared, W[tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        path = self._path(block, group, f"tile-{number}")
        save_part(path, tensors, json.dumps(dataclasses.asdict(prepared.outcome_())))

    def merge(
        self, round_index: int, index: int
    ) -> tuple[dict[str, QuantizedLinear], list[LayerRecord], dict[str, float]]:
        """Every layer of a block, the records of its groups, the seconds that all but the tiles took by phase."""
        block = self._enter(round_index, index)
        seconds: dict[str, float] = {}
        layers: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for group in range(len(block.groups)):
            add_seconds(seconds, self._note(block, group, "sum")["seconds"])
            add_seconds(seconds, self._note(block, group, "decision")["seconds"])
            solved, own = self._solved(block, group)
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
            block = self._block = _Block(round_index, unit, [], [], stage.weights(unit), {})
            if chunk is not None:
                hidden = stage.hidden("round-0", index, chunk)
                for found in input_stages(stage.layers(unit), lambda: stage.forward(index, hidden)):
                    block.stages.append(list(range(len(block.groups), len(block.groups) + len(found))))
                    block.groups += [[name for operand in group for name in operand.names] for group in found]
            else:
                first = "sum" if self._is_there(block, 0, "sum") else "share-0"
                note = self._note(block, 0, first)
                block.groups += note["groups"]
                block.stages += note["stages"]
        return self._block

    def _inputs(
        self, block: _Block, groups: Sequence[int], stream: str, chunk: str, weights: Mapping[str, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """What groups read of one chunk, with other weights in some layers of the block."""
        stage, index = self._stage, block.unit.index
        wanted = {self._operand(block, group): group for group in groups}
        layers = stage.layers(block.unit)
        with layers.replaced(weights):
            hidden = stage.hidden(stream, index, chunk)
            found = inputs_of(layers, wanted.keys(), lambda: stage.forward(index, hidden))
        return {wanted[operand]: X for operand, X in found.items()}

    def _operand(self, block: _Block, group: int) -> Operand:
        """The first operand of a group."""
        first = block.groups[group][0]
        return next(operand for operand in self._stage.layers(block.unit).operands if first in operand.names)

    def _accumulators(self, block: _Block, group: int) -> tuple[HessianAccumulator, DriftAccumulator | None]:
        """Empty sums for a group; the drift's only where errors are compensated.

        Of experts none are: the tokens that reach one are not the same in the source model.
        """
        stage, operand = self._stage, self._operand(block, group)
        compensated = stage.spec.quantization.compensates and operand.expert is None
        drift = DriftAccumulator(operand.columns, stage.device) if compensated else None
        return HessianAccumulator(operand.columns, stage.device, operand.expert is not None), drift

    def _sums(self, block: _Block, group: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """A group's sums and their note, as they were given out, or from its shares."""
        path = self._path(block, group, "sum")
        if self._is_there(block, group, "sum"):
            sums, text = load_part(path)
            return sums, json.loads(text)
        seconds: dict[str, float] = {}
        H, drift = self._merged(block, group, seconds)
        experts, operand, name = self._stage.spec.experts, self._operand(block, group), "+".join(block.groups[group])
        if is_starved(operand, H.num_tokens, experts):
            known = self._starved(block, group, H.num_tokens)
        else:
            known = GroupStatistics(tuple(block.groups[group]), H.finish_(name), H.num_tokens, H.num_tokens)
        sums = {"hessian": known.H} | ({"drift": drift.finish_(name)} if drift is not None else {})
        note = {**_layout(block), **_counts(known), "seconds": seconds}
        save_part(path, sums, json.dumps(note))
        return sums, note

    def _merged(
        self, block: _Block, group: int, seconds: dict[str, float]
    ) -> tuple[HessianAccumulator, DriftAccumulator | None]:
        """A group's sums over all shares, in their order; the time that those took is added to `seconds`."""
        stage = self._stage
        H, drift = self._accumulators(block, group)
        for number in range(len(shares(stage.spec.chunks, stage.spec.shares))):
            tensors, text = load_part(self._path(block, group, f"share-{number}"))
            note = json.loads(text)
            add_seconds(seconds, note["seconds"])
            H.merge_(tensors["hessian"].to(stage.device), note["num_tokens"])
            if drift is not None:
                drift.merge_(tensors["drift"].to(stage.device), note["num_tokens"])
        return H, drift

    def _starved(self, block: _Block, group: int, routed_tokens: int) -> GroupStatistics:
        """What takes the place of the statistics of an expert that too few tokens reached."""
        stage, operand = self._stage, self._operand(block, group)
        experts, layers = stage.spec.experts, stage.layers(block.unit)
        sums: dict[str, HessianAccumulator] = {}
        stage_index = next(i for i, groups in enumerate(block.stages) if group in groups)
        if experts.policy == "all-tokens":
            with layers.replaced(self._dequantized(block, stage_index)):
                sums = feed_all_tokens(layers, [operand], stage.repeats("round-0", block.unit.index), stage.device)
        elif experts.policy == "shared-hessian":
            shared = HessianAccumulator(operand.columns, stage.device)
            for other in block.stages[stage_index]:
                own, _ = self._merged(block, other, {})
                shared.merge_(own.partial, own.num_tokens)
            sums = {operand.parameter: shared}
        return starved_statistics(operand, routed_tokens, experts, sums, stage.device)

    def _dequantized(self, block: _Block, stage_index: int) -> dict[str, torch.Tensor]:
        """Weights of the stages before as they were quantized, in the compute dtype."""
        groups = [group for before in range(stage_index) for group in block.stages[before]]
        solved = [self._solved(block, group)[0] for group in groups]
        dtype, device = self._stage.spec.compute_dtype, self._stage.device
        return {name: layer.dequantize().to(device, dtype) for layers in solved for name, layer in layers.items()}

    def _prepare(
        self,
        block: _Block,
        members: tuple[str, ...],
        sums: Mapping[str, torch.Tensor],
        settings: Quantization,
        regularization: Regularizer,
    ) -> tuple[LinearGroup, torch.Tensor]:
        """What a group's rows share, and the stack of its weights."""
        stage = self._stage
        name, W = stack([(member, block.weights[member]) for member in members])
        H, drift = sums["hessian"].to(stage.device), sums.get("drift")
        drift = drift.to(stage.device) if drift is not None else None
        return prepare_group(name, W, H, settings, regularization, stage.scale_dtype(block.unit), drift), W

    def _rounded(
        self, note: Mapping[str, Any], settings: Quantization, regularization: Regularizer
    ) -> tuple[Quantization, Regularizer]:
        """The settings of a group, without statistics where there are none."""
        return rounded(settings, regularization) if note["fallback"] == "rtn" else (settings, regularization)

    def _solved(self, block: _Block, group: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Layers and records of a group whose tiles are all solved."""
        if group not in block.solved:
            note = self._note(block, group, "sum")
            parts: dict[tuple[str, ...], list[tuple[_Tile, SolvedRows, GroupOutcome]]] = {}
            for number, tile in enumerate(self._tiles(block, group)):
                solved, outcome = self._read_tile(block, group, number, tile.settings)
                parts.setdefault(tile.members, []).append((tile, solved, outcome))
            layers: dict[str, QuantizedLinear] = {}
            records = []
            for members, tiles in parts.items():
                weights = [(name, block.weights[name]) for name in members]
                outcome = _together("+".join(members), [outcome for _, _, outcome in tiles])
                solved_rows = [rows for _, rows, _ in tiles]
                settings = tiles[0][0].settings
                quantized, record = merge_rows(weights, settings, solved_rows, outcome, note["num_tokens"])
                layers |= quantized
                errors = {int(bits): e for bits, e in self._decided(block, group, members)["errors"].items()}
                counted = {"routed_tokens": note["routed_tokens"], "fallback": note["fallback"]}
                records.append(dataclasses.replace(record, width_errors=errors, **counted))
            block.solved[group] = (layers, records)
        return block.solved[group]

    def _settings(self, block: _Block) -> dict[str, Quantization]:
        return layer_settings(self._stage.spec.run, self._stage.spec.quantization, block.unit, block.round_index)

    def _tiles(self, block: _Block, group: int) -> list[_Tile]:
        return [
            _Tile(own, tuple(members), tile)
            for own, members in by_settings(block.groups[group], self._settings(block))
            for tile in self._cut(block.unit, members)
        ]

    def _cut(self, unit: BlockUnit, members: Sequence[str]) -> list[slice]:
        shapes = [linear for linear in unit.linears if linear.name in members]
        return row_tiles(sum(linear.rows for linear in shapes), shapes[0].columns, self._stage.device.type)

    def _read_tile(
        self, block: _Block, group: int, number: int, settings: Quantization
    ) -> tuple[SolvedRows, GroupOutcome]:
        tensors, note = load_part(self._path(block, group, f"tile-{number}"))
        group_size = settings.columns_per_group(tensors["Q"].shape[1])
        grid = Grid(tensors["scale"], tensors["zero"], settings.width, group_size, settings.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), GroupOutcome(**json.loads(note))

    def _decided(self, block: _Block, group: int, members: Sequence[str]) -> dict[str, Any]:
        """What was decided for some layers of a group."""
        decided: dict[str, Any] = self._note(block, group, "decision")["decided"]["+".join(members)]
        return decided

    def _note(self, block: _Block, group: int, name: str) -> dict[str, Any]:
        """What is noted with a part of a group."""
        note: dict[str, Any] = json.loads(read_part_note(self._path(block, group, name)))
        return note

    def _is_there(self, block: _Block, group: int, name: str) -> bool:
        """Lists the folder, as `RunDirectory.present` does, because another machine may be yet to write the file."""
        path = self._path(block, group, name)
        return path in path.parent.glob("*")

    def _path(self, block: _Block, group: int, name: str) -> Path:
        return self._stage.spec.run.partial(block.round_index, block.unit.index, f"{group}-{name}")


def _layout(block: _Block) -> dict[str, Any]:
    return {"groups": block.groups, "stages": block.stages}


def _counts(known: GroupStatistics) -> dict[str, Any]:
    return {"num_tokens": known.num_tokens, "routed_tokens": known.routed_tokens, "fallback": known.fallback}


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
