"""What a worker does of a block that several work on: a share of its statistics, a decision, a tile of its rows, or of
the sample that β is searched on.

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
from astro.quantization.row_solver import Figures, LinearGroups, measure_width, prepare_groups, solve_rows
from astro.timing import add_seconds
from astro_dist.planning.units import BlockUnit
from astro_dist.schedule.sequential import shares
from astro_dist.worker.block_runner import Stage
from astro_dist.worker.hessian_shares import Sums
from astro_dist.worker.split_block import SharedBlock, Tile

__all__ = ["TileSolver"]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Groups side by side that are ready to be solved, and their weights; kept from call to call."""

    names: tuple[str, ...]
    groups: LinearGroups
    W: torch.Tensor


class TileSolver:
    """The parts of one block that this worker does."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sums = Sums(stage)
        self.forget()

    def forget(self) -> None:
        """Let go of the block, of its Hessians and factors: something else needs the memory."""
        self._block: SharedBlock | None = None
        self._prepared: _Prepared | None = None
        self._chosen: _Prepared | None = None
        self._sums.forget()

    def share(self, index: int, stage_index: int, number: int) -> dict[str, Any]:
        """Partial sums of a stage's batches from one share of the calibration chunks.

        Returns:
            `stages` of the block, and `groups`: each batch of this stage with its parts, see `SharedBlock.parts`.
        """
        stage, start = self._stage, time.perf_counter()
        block = self._enter(0, index, shares(stage.spec.chunks, stage.spec.shares)[number][0])
        self._sums.share(block, stage_index, number, start)
        batches = block.stages[stage_index] if block.stages else []
        return {"stages": len(block.stages), "groups": {batch: block.parts(batch) for batch in batches}}

    def give_out(
        self,
        round_index: int,
        unit: BlockUnit,
        groups: Sequence[Sequence[str]],
        statistics: Iterable[InputStatistics],
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
            `groups`: each batch with its parts, see `SharedBlock.parts`; that with the widest input first.
        """
        block = SharedBlock(self._stage.spec, round_index, unit)
        block.lay_out([groups])
        self._sums.give_out(block, statistics, seconds)
        widest = sorted(range(len(block.batches)), key=lambda batch: -block.columns(batch))
        return {"groups": [(batch, block.parts(batch)) for batch in widest]}

    def decide(self, round_index: int, index: int, batch: int) -> None:
        """Add up a batch's shares, where it has any, in their order; see that it can be solved, and measure widths."""
        block = self._enter(round_index, index)
        sums, note = self._sums.of(block, batch)
        errors: dict[str, dict[int, float]] = {}
        seconds: dict[str, float] = {}
        for tile in {tile.names: tile for tile in block.tiles(batch)}.values():
            ready = self._prepare_(block, tile, sums, note)
            measured = {bits: measure_width(ready.groups, ready.W, bits) for bits in self._stage.widths(round_index)}
            errors |= {name: {bits: own[i] for bits, own in measured.items()} for i, name in enumerate(tile.names)}
            add_seconds(seconds, ready.groups.spent_())
        block.save(batch, "decision", {}, {"width_errors": errors, "seconds": seconds})

    def weigh(self, round_index: int, index: int, batch: int, number: int) -> None:
        """Try every β on one tile of a batch's sampled rows."""
        block = self._enter(round_index, index)
        tile = block.sample_tiles(batch)[number]
        ready = self._ready(block, batch, tile)
        errors = beta_search.weigh(ready.groups, ready.W, tile.rows)
        block.save(batch, f"sample-{number}", {"errors": errors}, {"seconds": ready.groups.spent_()})

    def tile(self, round_index: int, index: int, batch: int, number: int) -> None:
        """Solve one tile of a batch's rows."""
        block = self._enter(round_index, index)
        tile = block.tiles(batch)[number]
        ready = self._ready(block, batch, tile)
        if ready.groups.beta is None:
            # Beside what was prepared: a sample may have to be weighed once more.
            if self._chosen is None or self._chosen.names != tile.names:
                chosen = beta_search.choose(ready.groups, self._sample_errors(block, batch, tile))
                self._chosen = dataclasses.replace(ready, groups=chosen)
            ready = self._chosen
        solved = solve_rows(ready.groups, ready.W[:, tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        outcomes = [dataclasses.asdict(outcome) for outcome in ready.groups.outcomes_()]
        block.save(batch, f"tile-{number}", tensors, outcomes)

    def merge(
        self, round_index: int, index: int
    ) -> tuple[dict[str, QuantizedLinear], list[LayerRecord], dict[str, float]]:
        """Every layer of a block, the records of its groups, the seconds that all but the tiles took by phase."""
        block = self._enter(round_index, index)
        seconds: dict[str, float] = {}
        layers: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for batch in range(len(block.batches)):
            samples = [f"sample-{number}" for number in range(len(block.sample_tiles(batch)))]
            for part in ("sum", "decision", *samples):
                add_seconds(seconds, block.note(batch, part)["seconds"])
            solved, own = block.solved(batch)
            layers |= solved
            records += own
        self.forget()
        return layers, records, seconds

    def _enter(self, round_index: int, index: int, chunk: str | None = None) -> SharedBlock:
        """Turn to a block; which of its layers share an input is found with a chunk, for which it is loaded, or was
        noted. Who only solves reads the weights of a batch at a time.
        """
        stage = self._stage
        if self._block is None or (self._block.round_index, self._block.unit.index) != (round_index, index):
            self.forget()
        unit = stage.load("original", index) if chunk is not None else stage.spec.plan.blocks[index]
        if self._block is None:
            block = SharedBlock(stage.spec, round_index, unit)
            if unit.linears and chunk is not None:
                hidden = stage.hidden("round-0", index, chunk)
                found = input_stages(stage.layers(unit), lambda: stage.forward(index, hidden))
                block.lay_out([[names_of(group) for group in groups] for groups in found])
            elif unit.linears:
                block.lay_out(block.note(0, "sum" if block.is_there(0, "sum") else "share-0")["layout"])
            self._block = block
        return self._block

    def _ready(self, block: SharedBlock, batch: int, tile: Tile) -> _Prepared:
        """What a tile's groups share, at hand from the call before, or from their sums."""
        if self._prepared is None or self._prepared.names != tile.names:
            return self._prepare_(block, tile, *self._sums.read(block, batch))
        return self._prepared

    def _prepare_(
        self, block: SharedBlock, tile: Tile, sums: Mapping[str, torch.Tensor], note: Mapping[str, Any]
    ) -> _Prepared:
        """What a tile's groups share; kept for the next call."""
        stage = self._stage
        self._prepared = self._chosen = None  # makes room
        weights = stage.weights(block.unit, [name for names in tile.members for name in names])
        W = stack([[weights[name] for name in names] for names in tile.members])
        H, drift = sums["hessian"].to(stage.device), sums.get("drift")
        drift = drift.to(stage.device) if drift is not None else None
        settings, regularization = tile.settings, stage.spec.regularization
        scale_dtype = stage.scale_dtype(block.unit)
        rounded = [fallback == "rtn" for fallback in note["fallback"]]
        groups = prepare_groups(tile.names, W, H, settings, regularization, scale_dtype, drift, rounded)
        self._prepared = _Prepared(tile.names, groups, W)
        return self._prepared

    def _sample_errors(self, block: SharedBlock, batch: int, tile: Tile) -> torch.Tensor:
        """Errors of the sampled rows of a tile's groups under every β."""
        numbers = [n for n, sample in enumerate(block.sample_tiles(batch)) if sample.names == tile.names]
        errors = [block.load(batch, f"sample-{n}")[0]["errors"] for n in numbers]
        return torch.cat(errors, dim=-1).to(self._stage.device)
