"""What a worker does of a block that several work on.

It is a share of the block's statistics, a decision, a tile of its rows, or of the sample that β is searched on.

In mode `sequential` a block is solved stage by stage; in mode `blocks` one worker gives out the sums of all groups,
which wait for nothing. Workers hand each other sums, decisions, the errors of the sample under every β, and solved
tiles as files.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from astro.calibration.block_statistics import input_stages
from astro.calibration.starved_experts import InputStatistics
from astro.model.activations import names_of
from astro.quantization import beta_search
from astro.quantization.grid import QuantizedLinear
from astro.quantization.input_group import stack
from astro.quantization.layer_record import LayerRecord
from astro.quantization.row_solver import Figures, InputGroups, measure_width, prepare_input_groups, solve_rows
from astro.timing import add_seconds
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BlockParts,
    MergeHessians,
    PartCall,
    SolveRows,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import DECISION, ORIGINAL, SUM, round_stream, sample_part, share_part, tile_part
from astro_dist.schedule.sequential import shares
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.hessian_shares import HessianShares
from astro_dist.worker.split_block import BlockInParts, Tile

__all__ = ["SplitSolver"]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Groups side by side that are ready to be solved, and their weights; kept from call to call."""

    names: tuple[str, ...]
    groups: InputGroups
    W: torch.Tensor


class SplitSolver:
    """The parts of one block that this worker does."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self._shares = HessianShares(runner)
        self.forget()

    def forget(self) -> None:
        """Let go of the block, of its Hessians and factors: something else needs the memory."""
        self._block: BlockInParts | None = None
        self._prepared: _Prepared | None = None
        self._chosen: _Prepared | None = None
        self._shares.forget()

    def accumulate_hessians(self, call: AccumulateHessians) -> BlockParts:
        """Sum the Hessians of a stage's batches over one share of the calibration chunks."""
        runner, start = self._runner, time.perf_counter()
        block = self._enter((0, call.block), shares(runner.spec.chunks, runner.spec.shares)[call.share][0])
        self._shares.accumulate(block, call.stage, call.share, start)
        batches = block.stages[call.stage] if block.stages else []
        return BlockParts(tuple(map(block.parts, batches)), len(block.stages))

    def split_block(
        self,
        round_index: int,
        unit: BlockUnit,
        groups: Sequence[Sequence[str]],
        statistics: Iterable[InputStatistics],
        seconds: Mapping[str, float],
    ) -> BlockParts:
        """Hand on the Hessians of all input groups of a block that this worker fed.

        Args:
            round_index: Index of the round.
            unit: The block.
            groups: The input groups: names of the layers that read one input.
            statistics: Those of every input group, finished here.
            seconds: What was spent on the block so far, by phase.

        Returns:
            The parts of all batches, that with the widest input first.
        """
        block = BlockInParts(self._runner.spec, round_index, unit)
        block.lay_out([groups])
        self._shares.save_sums(block, statistics, seconds)
        widest = sorted(range(len(block.batches)), key=lambda batch: -block.columns(batch))
        return BlockParts(tuple(map(block.parts, widest)))

    def do(self, call: PartCall) -> None:
        """Do one of the calls by which several workers solve a block."""
        match call:
            case MergeHessians():
                self.merge_hessians(call)
            case TryBetas():
                self.try_betas(call)
            case SolveRows():
                self.solve_rows(call)

    def merge_hessians(self, call: MergeHessians) -> None:
        """Add up a batch's shares, where it has any, in their order; see that it can be solved, and measure widths."""
        block, batch = self._enter(call.place), call.batch
        sums, note = self._shares.of(block, batch)
        errors: dict[str, dict[int, float]] = {}
        seconds: dict[str, float] = {}
        for tile in {tile.names: tile for tile in block.tiles(batch)}.values():
            ready = self._prepare_(block, tile, sums, note)
            widths = self._runner.widths(call.round_index)
            measured = {bits: measure_width(ready.groups, ready.W, bits) for bits in widths}
            errors |= {name: {bits: own[i] for bits, own in measured.items()} for i, name in enumerate(tile.names)}
            add_seconds(seconds, ready.groups.spent_())
        block.save(batch, DECISION, {}, {"width_errors": errors, "seconds": seconds})

    def try_betas(self, call: TryBetas) -> None:
        """Try every β on one tile of a batch's sampled rows."""
        block = self._enter(call.place)
        tile = block.sample_tiles(call.batch)[call.tile]
        ready = self._ready(block, call.batch, tile)
        errors = beta_search.try_betas(ready.groups, ready.W, tile.rows)
        block.save(call.batch, sample_part(call.tile), {"errors": errors}, {"seconds": ready.groups.spent_()})

    def solve_rows(self, call: SolveRows) -> None:
        """Solve one tile of a batch's rows."""
        block = self._enter(call.place)
        tile = block.tiles(call.batch)[call.tile]
        ready = self._ready(block, call.batch, tile)
        if ready.groups.beta is None:
            # Beside what was prepared: betas may have to be tried on a sample once more.
            if self._chosen is None or self._chosen.names != tile.names:
                chosen = beta_search.choose(ready.groups, self._sample_errors(block, call.batch, tile))
                self._chosen = dataclasses.replace(ready, groups=chosen)
            ready = self._chosen
        solved = solve_rows(ready.groups, ready.W[:, tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        outcomes = [dataclasses.asdict(outcome) for outcome in ready.groups.outcomes_()]
        block.save(call.batch, tile_part(call.tile), tensors, outcomes)

    def put_together(self, call: WriteBlock) -> tuple[dict[str, QuantizedLinear], list[LayerRecord], dict[str, float]]:
        """Put a block's solved tiles together.

        Returns:
            Every layer by name; the records of the input groups; the seconds that all but the tiles took, by phase.
        """
        block = self._enter(call.place)
        seconds: dict[str, float] = {}
        layers: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for batch in range(len(block.batches)):
            samples = [sample_part(tile) for tile in range(len(block.sample_tiles(batch)))]
            for part in (SUM, DECISION, *samples):
                add_seconds(seconds, block.note(batch, part)["seconds"])
            solved, solved_records = block.solved(batch)
            layers |= solved
            records += solved_records
        self.forget()
        return layers, records, seconds

    def _enter(self, place: tuple[int, int], chunk: str | None = None) -> BlockInParts:
        """Turn to a block.

        Which of its layers share an input is found with a chunk, for which the block is loaded, or was noted before. A
        worker that only solves reads the weights of a batch at a time.
        """
        runner, (round_index, index) = self._runner, place
        if self._block is None or (self._block.round_index, self._block.unit.index) != place:
            self.forget()
        unit = runner.load(ORIGINAL, index) if chunk is not None else runner.spec.plan.blocks[index]
        if self._block is None:
            block = BlockInParts(runner.spec, round_index, unit)
            if unit.linears and chunk is not None:
                hidden = runner.hidden(round_stream(0), index, chunk)
                found = input_stages(runner.layers(unit), lambda: runner.forward(index, hidden))
                block.lay_out([[names_of(group) for group in groups] for groups in found])
            elif unit.linears:
                block.lay_out(block.note(0, SUM if block.is_there(0, SUM) else share_part(0))["layout"])
            self._block = block
        return self._block

    def _ready(self, block: BlockInParts, batch: int, tile: Tile) -> _Prepared:
        """What a tile's groups share, at hand from the call before, or from their sums."""
        if self._prepared is None or self._prepared.names != tile.names:
            return self._prepare_(block, tile, *self._shares.read(block, batch))
        return self._prepared

    def _prepare_(
        self, block: BlockInParts, tile: Tile, sums: Mapping[str, torch.Tensor], note: Mapping[str, Any]
    ) -> _Prepared:
        """What a tile's groups share; kept for the next call."""
        runner = self._runner
        self._prepared = self._chosen = None  # makes room
        weights = runner.weights(block.unit, [name for names in tile.members for name in names])
        W = stack([[weights[name] for name in names] for names in tile.members])
        H, drift = sums["hessian"].to(runner.device), sums.get("drift")
        drift = drift.to(runner.device) if drift is not None else None
        recipe, lacking = runner.recipe(block.unit), [fallback == "rtn" for fallback in note["fallback"]]
        groups = prepare_input_groups(tile.names, W, H, tile.scheme, recipe, drift, lacking)
        self._prepared = _Prepared(tile.names, groups, W)
        return self._prepared

    def _sample_errors(self, block: BlockInParts, batch: int, tile: Tile) -> torch.Tensor:
        """Errors of the sampled rows of a tile's groups under every β."""
        numbers = [n for n, sample in enumerate(block.sample_tiles(batch)) if sample.names == tile.names]
        errors = [block.load(batch, sample_part(n))[0]["errors"] for n in numbers]
        return torch.cat(errors, dim=-1).to(self._runner.device)
