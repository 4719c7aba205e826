"""What a worker does of a block that several work on: a share of a layer group's statistics, a tile of its rows, or
of the sample that its β is searched on.

A block is solved group by group, each of layers that share an input. In mode `sequential` groups come in stages that
follow the block's forward, and a stage's inputs already hold the errors of the stages before; in mode `blocks` one
worker gives out the sums of all groups, which wait for nothing. Workers hand each other sums, decisions, the errors of
the sample under every β, and solved tiles as files. A share is a fixed part of the calibration chunks and a tile one of
the rows: it does not matter who does which.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro import beta
from astro.block import by_settings
from astro.config import Quantization
from astro.errors import RunError
from astro.expert_policy import AllTokens, GroupStatistics, is_starved, rounded, starved_statistics
from astro.grid import Grid
from astro.group import Figures, GroupOutcome, LinearGroup, SolvedRows, measure_width, prepare_group, solve_rows
from astro.hessian import DriftAccumulator, HessianAccumulator
from astro.layer import QuantizedLinear, merge_rows, stack
from astro.observation import Operand
from astro.parts import load_part, read_part_note, save_part
from astro.report import LayerRecord, add_seconds, timed
from astro.statistics import input_stages, inputs_of
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
    settings: dict[str, Quantization]
    groups: list[list[str]] = dataclasses.field(default_factory=list)
    stages: list[list[int]] = dataclasses.field(default_factory=list)
    solved: dict[int, tuple[dict[str, QuantizedLinear], list[LayerRecord]]] = dataclasses.field(default_factory=dict)
    prepared: tuple[tuple[str, ...], LinearGroup, torch.Tensor] | None = None
    chosen: tuple[tuple[str, ...], LinearGroup] | None = None
    instead: dict[int, HessianAccumulator | AllTokens] = dataclasses.field(default_factory=dict)


class TileSolver:
    """The parts of one block that this worker does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._block: _Block | None = None

    def share(self, index: int, stage_index: int, number: int) -> dict[str, Any]:
        """Partial sums of a stage's groups from one share of the calibration chunks.

        Returns:
            `stages` of the block, and `groups` of this one, each with its parts: see `_parts`.
        """
        stage, start = self._stage, time.perf_counter()
        chunks = shares(stage.spec.chunks, stage.spec.shares)[number]
        block = self._enter(0, index, chunks[0])
        groups = block.stages[stage_index] if block.stages else []
        sums = {group: self._accumulators(block, group) for group in groups}
        quantized = self._dequantized(block, stage_index)
        seconds = {"hessian": 0.0, "compensate": 0.0}
        drifts = [group for group in groups if sums[group][1] is not None]
        layers = stage.layers(block.unit)
        with layers.replaced({} if drifts else quantized):
            for chunk in chunks:
                with layers.replaced(quantized if drifts else {}):
                    inputs = self._inputs(block, groups, "round-0", chunk)
                before = self._inputs(block, drifts, "original", chunk) if drifts else {}
                for group, X in inputs.items():
                    H, drift = sums[group]
                    with timed(seconds, "hessian"):
                        H.add_(X)
                    if drift is not None:
                        with timed(seconds, "compensate"):
                            drift.add_(before[group], X)
        seconds["forward"] = time.perf_counter() - start - sum(seconds.values())
        for group in groups:
            H, drift = sums.pop(group)  # one full matrix at a time
            tensors = {"hessian": H.partial} | ({"drift": drift.partial} if drift is not None else {})
            note = {**_layout(block), "num_tokens": H.num_tokens, "seconds": seconds if group == groups[0] else {}}
            save_part(self._path(block, group, f"share-{number}"), tensors, json.dumps(note))
        return {"stages": len(block.stages), "groups": {group: self._parts(block, group) for group in groups}}

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
            `groups`: each with its parts, see `_parts`; the group with the widest input first.
        """
        block = _Block(round_index, unit, self._settings(round_index, unit), [list(names) for names in groups])
        columns = []
        for group, known in enumerate(statistics):
            note = {**_layout(block), **_counts(known), "seconds": {} if group else dict(seconds)}
            save_part(self._path(block, group, "sum"), {"hessian": known.H}, json.dumps(note))
            columns.append(len(known.H))
        widest = sorted(range(len(columns)), key=lambda group: -columns[group])
        return {"groups": [(group, self._parts(block, group)) for group in widest]}

    def decide(self, round_index: int, index: int, group: int) -> None:
        """Add up a group's shares, where it has any, in their order; see that it can be solved, and measure widths."""
        block = self._enter(round_index, index)
        sums = self._sums(block, group)
        width_errors, seconds = {}, dict[str, float]()
        for settings, members in by_settings(block.groups[group], block.settings):
            prepared, W = self._prepare_(block, settings, tuple(members), *sums)
            width_errors["+".join(members)] = {
                bits: measure_width(prepared, W, bits) for bits in self._stage.widths(round_index)
            }
            add_seconds(seconds, prepared.spent_())
        content = {"width_errors": width_errors, "seconds": seconds}
        save_part(self._path(block, group, "decision"), {}, json.dumps(content))

    def weigh(self, round_index: int, index: int, group: int, number: int) -> None:
        """Try every β on one tile of a group's sampled rows; none where it is rounded for want of statistics."""
        block = self._enter(round_index, index)
        tile = self._sample_tiles(block, group)[number]
        prepared, W = self._prepared(block, group, tile)
        errors = beta.weigh(prepared, W, tile.rows) if prepared.beta is None else torch.empty(beta.NUM_CANDIDATES, 0)
        note = json.dumps({"seconds": prepared.spent_()})
        save_part(self._path(block, group, f"sample-{number}"), {"errors": errors}, note)

    def tile(self, round_index: int, index: int, group: int, number: int) -> None:
        """Solve one tile of a group's rows."""
        block = self._enter(round_index, index)
        tile = self._tiles(block, group)[number]
        prepared, W = self._prepared(block, group, tile)
        if prepared.beta is None:
            # Beside what was prepared: a sample may have to be weighed once more.
            if block.chosen is None or block.chosen[0] != tile.members:
                errors = self._sample_errors(block, group, tile.members)
                block.chosen = (tile.members, beta.choose(prepared, errors))
            prepared = block.chosen[1]
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
            samples = [f"sample-{number}" for number in range(len(self._sample_tiles(block, group)))]
            for part in ("sum", "decision", *samples):
                add_seconds(seconds, self._note(block, group, part)["seconds"])
            solved, own = self._solved(block, group)
            layers |= solved
            records += own
        self._block = None
        return layers, records, seconds

    def _enter(self, round_index: int, index: int, chunk: str | None = None) -> _Block:
        """Turn to a block; which of its layers share an input is found with a chunk, for which it is loaded, or was
        noted. Who only solves reads the weights of a group at a time.
        """
        stage = self._stage
        if self._block is None or (self._block.round_index, self._block.unit.index) != (round_index, index):
            self.forget()
        unit = stage.load("original", index) if chunk is not None else stage.spec.plan.blocks[index]
        if self._block is None:
            block = self._block = _Block(round_index, unit, self._settings(round_index, unit))
            if not unit.linears:
                return block
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

    def _inputs(self, block: _Block, groups: Sequence[int], stream: str, chunk: str) -> dict[int, torch.Tensor]:
        """What groups read of one chunk, with the weights that are in the block now."""
        stage, index = self._stage, block.unit.index
        wanted = {self._operand(block, group): group for group in groups}
        hidden = stage.hidden(stream, index, chunk)
        found = inputs_of(stage.layers(block.unit), wanted.keys(), lambda: stage.forward(index, hidden))
        return {wanted[operand]: X for operand, X in found.items()}

    def _operand(self, block: _Block, group: int) -> Operand:
        """The first operand of a group."""
        return self._stage.layers(block.unit).by_name[block.groups[group][0]]

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
        experts, layers = stage.spec.experts, stage.layers(stage.load("original", block.unit.index))
        stage_index = next(i for i, groups in enumerate(block.stages) if group in groups)
        if experts.policy == "all-tokens":
            with layers.replaced(self._dequantized(block, stage_index)):
                again = block.instead.get(stage_index)
                if not isinstance(again, AllTokens):
                    repeats = stage.repeats("round-0", block.unit.index)
                    again = block.instead[stage_index] = AllTokens(layers, [operand], repeats)
                sums = again.sums(operand, stage.device)
            return starved_statistics(operand, routed_tokens, experts, sums, stage.device)
        shared = block.instead.get(stage_index)
        if experts.policy == "shared-hessian" and not isinstance(shared, HessianAccumulator):
            shared = block.instead[stage_index] = HessianAccumulator(operand.columns, stage.device)
            for other in block.stages[stage_index]:
                shared.absorb_(self._merged(block, other, {})[0])
        found = shared if isinstance(shared, HessianAccumulator) else None
        return starved_statistics(operand, routed_tokens, experts, found, stage.device)

    def _dequantized(self, block: _Block, stage_index: int) -> dict[str, torch.Tensor]:
        """Weights of the stages before as they were quantized, in the compute dtype."""
        groups = [group for before in range(stage_index) for group in block.stages[before]]
        solved = [self._solved(block, group)[0] for group in groups]
        dtype, device = self._stage.spec.compute_dtype, self._stage.device
        return {name: layer.dequantize().to(device, dtype) for layers in solved for name, layer in layers.items()}

    def _prepared(self, block: _Block, group: int, tile: _Tile) -> tuple[LinearGroup, torch.Tensor]:
        """What a tile's group shares, and the stack of its weights: at hand from the call before, or from its sums."""
        if block.prepared is None or block.prepared[0] != tile.members:
            sums, note = load_part(self._path(block, group, "sum"))
            return self._prepare_(block, tile.settings, tile.members, sums, json.loads(note))
        return block.prepared[1:]

    def _prepare_(
        self,
        block: _Block,
        settings: Quantization,
        members: tuple[str, ...],
        sums: Mapping[str, torch.Tensor],
        note: Mapping[str, Any],
    ) -> tuple[LinearGroup, torch.Tensor]:
        """What a group's rows share, and the stack of its weights; kept for the next call."""
        stage = self._stage
        block.prepared = block.chosen = None  # makes room
        name, W = stack(list(stage.weights(block.unit, members).items()))
        H, drift = sums["hessian"].to(stage.device), sums.get("drift")
        drift = drift.to(stage.device) if drift is not None else None
        regularization, scale_dtype = stage.spec.regularization, stage.scale_dtype(block.unit)
        if note["fallback"] == "rtn":
            settings, regularization = rounded(settings, regularization)
        group = prepare_group(name, W, H, settings, regularization, scale_dtype, drift)
        block.prepared = (members, group, W)
        return group, W

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
                rows = [(name, block.unit.by_name[name].rows) for name in members]
                outcome = _together("+".join(members), [outcome for _, _, outcome in tiles])
                solved_rows = [rows for _, rows, _ in tiles]
                settings = tiles[0][0].settings
                quantized, record = merge_rows(rows, settings, solved_rows, outcome, note["num_tokens"])
                layers |= quantized
                noted = self._note(block, group, "decision")["width_errors"]["+".join(members)]
                errors = {int(bits): error for bits, error in noted.items()}
                counted = {"routed_tokens": note["routed_tokens"], "fallback": note["fallback"]}
                records.append(dataclasses.replace(record, width_errors=errors, **counted))
            block.solved[group] = (layers, records)
        return block.solved[group]

    def _settings(self, round_index: int, unit: BlockUnit) -> dict[str, Quantization]:
        return layer_settings(self._stage.spec.run, self._stage.spec.quantization, unit, round_index)

    def _parts(self, block: _Block, group: int) -> dict[str, int]:
        """Calls that a group takes after its decision, by method: all of one are done before the next begins."""
        return {"weigh": len(self._sample_tiles(block, group)), "tile": len(self._tiles(block, group))}

    def _tiles(self, block: _Block, group: int) -> list[_Tile]:
        """Of all rows."""
        return self._cut(block, group, row_tiles)

    def _sample_tiles(self, block: _Block, group: int) -> list[_Tile]:
        """Of the sampled rows, where β is searched."""
        is_searched = self._stage.spec.regularization.is_searched
        return self._cut(block, group, beta.sample_tiles) if is_searched else []

    def _cut(self, block: _Block, group: int, tiles: Callable[[int, int, str], list[slice]]) -> list[_Tile]:
        cut = []
        for settings, members in by_settings(block.groups[group], block.settings):
            shapes = [block.unit.by_name[name] for name in members]
            num_rows = sum(linear.rows for linear in shapes)
            rows = tiles(num_rows, shapes[0].columns, self._stage.device.type)
            cut += [_Tile(settings, tuple(members), own) for own in rows]
        return cut

    def _read_tile(
        self, block: _Block, group: int, number: int, settings: Quantization
    ) -> tuple[SolvedRows, GroupOutcome]:
        tensors, note = load_part(self._path(block, group, f"tile-{number}"))
        group_size = settings.columns_per_group(tensors["Q"].shape[1])
        grid = Grid(tensors["scale"], tensors["zero"], settings.width, group_size, settings.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), GroupOutcome(**json.loads(note))

    def _sample_errors(self, block: _Block, group: int, members: Sequence[str]) -> torch.Tensor:
        """Errors of some layers' sampled rows under every β."""
        tiles = enumerate(self._sample_tiles(block, group))
        paths = [self._path(block, group, f"sample-{n}") for n, tile in tiles if tile.members == members]
        return torch.cat([load_part(path)[0]["errors"] for path in paths], dim=1).to(self._stage.device)

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
