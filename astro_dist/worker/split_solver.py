"""What a worker does of a block that several workers solve: a part at a time.

A part is a share of the block's statistics, what they add up to, a tile of its rows, or a tile of the sample on which β
is searched. In mode `sequential` a block is solved stage by stage. In mode `blocks` one worker hands on the Hessians of
all input groups, which wait for nothing. Workers hand each other Hessians, measured widths, the errors of the sample
under every β, and solved tiles as files.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from astro.calibration.block_statistics import input_stages
from astro.calibration.starved_experts import InputStatistics
from astro.model.operands import names_of
from astro.quantization import beta_search
from astro.quantization.compensation import USUAL_SHARE, reproducible_share
from astro.quantization.corrections import CorrectedGroups, correct_input_groups
from astro.quantization.grid import QuantizedLinear
from astro.quantization.held_columns import HeldColumns
from astro.quantization.input_group import stack
from astro.quantization.layer_record import LayerRecord
from astro.quantization.prepared_groups import InputGroups, factor_input_groups, with_regularizer
from astro.quantization.recipe import Figures, InputMoments
from astro.quantization.row_solver import measure_width, solve_rows
from astro.timing import add_seconds, clock_s
from astro_dist.schedule.calls import (
    AccumulateHessians,
    BlockParts,
    MergeHessians,
    PartCall,
    Reconstruct,
    SolveRows,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.names import DECISION, ORIGINAL, SUM, round_stream, sample_part, share_part, tile_part
from astro_dist.schedule.sequential import shares
from astro_dist.worker.batch_statistics import BatchStatistics, read_sum, save_sums
from astro_dist.worker.block_recipe import measured_widths
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.fed_block import FedBlock
from astro_dist.worker.hessian_shares import HessianShares
from astro_dist.worker.share_merger import ShareMerger
from astro_dist.worker.solved_block import SolvedBlock
from astro_dist.worker.split_block import BlockInParts, Tile
from astro_dist.worker.summed_inputs import SummedInputs

__all__ = ["SplitSolver"]


@dataclasses.dataclass(frozen=True)
class _PreparedGroups:
    """Input groups side by side that are factored, and ready to be solved once they have their regularizer.

    They are kept from call to call.

    Attributes:
        names: Name of each input group.
        input_groups: What all of their rows share.
        W: Weights of all members of each, float32 [B, R, C], without the columns that corrections hold.
        held: These columns.
    """

    names: tuple[str, ...]
    input_groups: InputGroups
    W: torch.Tensor
    held: HeldColumns


class SplitSolver:
    """Does the parts of one block that this worker is asked for."""

    def __init__(self, runner: BlockRunner) -> None:
        """Begin without a block.

        Args:
            runner: Runner of the worker's blocks.
        """
        self._runner = runner
        self._inputs = SummedInputs(runner)
        self._shares = HessianShares(runner, self._inputs)
        self._merger = ShareMerger(runner, self._inputs)
        self.forget()

    def forget(self) -> None:
        """Let go of the block, of its Hessians and factors: something else needs the memory."""
        self._block: BlockInParts | None = None
        self._prepared: _PreparedGroups | None = None
        self._with_betas: _PreparedGroups | None = None
        self._inputs.forget()
        self._merger.forget()

    def accumulate_hessians(self, call: AccumulateHessians) -> BlockParts:
        """Sum the Hessians of a stage's batches over one share of the calibration chunks.

        Returns:
            The parts of the stage's batches.
        """
        runner, start = self._runner, clock_s(self._runner.device)
        block = self._turn_to((0, call.block), shares(runner.spec.chunks, runner.spec.shares)[call.share][0])
        following = call.block + 1
        if call.stage + 1 == len(block.stages) and following < len(runner.spec.plan.blocks):
            runner.expect_block(following)
        self._shares.accumulate(block, call.stage, call.share, start)
        batches = block.stages[call.stage] if block.stages else []
        return BlockParts(tuple(map(block.parts, batches)), len(block.stages))

    def split_block(self, fed_block: FedBlock, statistics: Iterable[InputStatistics]) -> BlockParts:
        """Hand on the Hessians of all input groups of a block that this worker fed.

        Args:
            fed_block: The block.
            statistics: Statistics of every input group in order, which are finished here.

        Returns:
            The parts of all batches, the batch with the widest input first.
        """
        block = BlockInParts(self._runner.spec, fed_block.round_index, fed_block.unit)
        block.lay_out([fed_block.input_groups])
        save_sums(block, statistics, fed_block.feeding_seconds(), fed_block.largest)
        widest = sorted(range(len(block.batches)), key=lambda batch: -block.columns(batch))
        return BlockParts(tuple(map(block.parts, widest)))

    def do(self, call: AccumulateHessians | PartCall) -> BlockParts | None:
        """Do one of the calls by which several workers solve a block; the parts of a stage come of the first."""
        match call:
            case AccumulateHessians():
                return self.accumulate_hessians(call)
            case MergeHessians():
                self.merge_hessians(call)
            case TryBetas():
                self.try_betas(call)
            case SolveRows():
                self.solve_rows(call)
            case Reconstruct():
                self.reconstruct(call)
        return None

    def merge_hessians(self, call: MergeHessians) -> None:
        """Add up the shares of a batch where there are any, see that it can be solved, and measure widths."""
        block, batch = self._turn_to(call.place), call.batch
        self._prepared = self._with_betas = None  # makes room
        statistics = self._merger.merge(block, batch)
        errors: dict[str, dict[int, float]] = {}
        compensation: dict[str, float] = {}
        seconds: dict[str, float] = {}
        for tile in {tile.names: tile for tile in block.tiles(batch)}.values():
            prepared = self._prepare_(block, tile, statistics)
            if prepared.input_groups.drift is not None:
                made_up_for = self._shares_to_make_up_for(block, batch, prepared, statistics)
                prepared = self._compensate_(prepared, made_up_for)
                compensation |= dict(zip(tile.names, made_up_for, strict=True))
            widths = measured_widths(self._runner.spec, call.round_index)
            measured = {bits: measure_width(prepared.input_groups, prepared.W, bits) for bits in widths}
            for i, name in enumerate(tile.names):
                errors[name] = {bits: of_width[i] for bits, of_width in measured.items()}
            add_seconds(seconds, prepared.input_groups.spent_())
        decision = {"width_errors": errors, "compensation": compensation, "seconds": seconds}
        block.save(batch, DECISION, {}, decision)

    def try_betas(self, call: TryBetas) -> None:
        """Try every β on one tile of a batch's sampled rows."""
        block = self._turn_to(call.place)
        tile = block.sample_tiles(call.batch)[call.tile]
        prepared = self._prepared_for(block, call.batch, tile)
        errors = beta_search.try_betas(prepared.input_groups, prepared.W, tile.rows)
        note = {"seconds": prepared.input_groups.spent_()}
        block.save(call.batch, sample_part(call.tile), {"errors": errors}, note)

    def solve_rows(self, call: SolveRows) -> None:
        """Solve one tile of a batch's rows."""
        block = self._turn_to(call.place)
        tile = block.tiles(call.batch)[call.tile]
        prepared = self._prepared_for(block, call.batch, tile)
        if prepared.input_groups.beta is None:
            # Kept beside what was prepared: betas may have to be tried on a sample once more.
            if self._with_betas is None or self._with_betas.names != tile.names:
                errors = self._sample_errors(block, call.batch, tile)
                with_betas = beta_search.choose(prepared.input_groups, errors)
                self._with_betas = dataclasses.replace(prepared, input_groups=with_betas)
            prepared = self._with_betas
        solved = solve_rows(prepared.input_groups, prepared.W[:, tile.rows])
        tensors = {"Q": solved.Q, "scale": solved.grid.scale, "zero": solved.grid.zero}
        tensors |= {field.name: getattr(solved.figures, field.name) for field in dataclasses.fields(Figures)}
        outcomes = [dataclasses.asdict(outcome) for outcome in prepared.input_groups.outcomes_()]
        block.save(call.batch, tile_part(call.tile), tensors, outcomes)

    def reconstruct(self, call: Reconstruct) -> None:
        """Correct the errors of a batch's rows, all of which are solved."""
        block, batch = self._turn_to(call.place), call.batch
        layers, _ = block.rounded(batch)
        corrected: list[CorrectedGroups] = []
        for tile in {tile.names: tile for tile in block.tiles(batch)}.values():
            prepared = self._factored_for(block, batch, tile)
            # The regularizer's operator is as large as a Hessian, and corrections need none.
            self._prepared = prepared = dataclasses.replace(
                prepared, input_groups=dataclasses.replace(prepared.input_groups, problem=None)
            )
            self._with_betas = None
            with prepared.held.put_back(prepared.W):
                groups = correct_input_groups(prepared.input_groups, prepared.W, block.members(tile), layers)
            corrected += [groups] if groups else []
        block.save_corrections(batch, corrected)

    def put_together(self, call: WriteBlock) -> SolvedBlock:
        """Put a block's solved tiles together."""
        block = self._turn_to(call.place)
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
        scales = block.cache_scales
        self.forget()
        return SolvedBlock(layers, records, seconds, scales)

    def _turn_to(self, place: tuple[int, int], chunk: str | None = None) -> BlockInParts:
        """Return a block that is laid out, and let go of any other.

        With a chunk the block is loaded, and a forward of the chunk shows which layers share an input. Without one that
        is read from the first part that was written: a worker that only solves reads the weights of a batch at a time.
        """
        runner, (round_index, index) = self._runner, place
        if self._block is None or (self._block.round_index, self._block.unit.index) != place:
            self.forget()
        unit = runner.load(ORIGINAL, index) if chunk is not None else runner.spec.plan.blocks[index]
        if self._block is None:
            block = BlockInParts(runner.spec, round_index, unit)
            if unit.linears and chunk is not None:
                state = runner.states.read(round_stream(0), index, chunk)
                stages = input_stages(runner.layers(unit), lambda: runner.forward(index, state, chunk))
                block.lay_out([[names_of(operands) for operands in input_groups] for input_groups in stages])
            elif unit.linears:
                block.lay_out(block.note(0, SUM if block.is_there(0, SUM) else share_part(0))["layout"])
            self._block = block
        return self._block

    def _factored_for(self, block: BlockInParts, batch: int, tile: Tile) -> _PreparedGroups:
        """The input groups of a tile, as a call before left them or from their statistics."""
        prepared = self._prepared
        if prepared is None or prepared.names != tile.names:
            prepared = self._prepare_(block, tile, read_sum(block, batch, self._runner.device))
            if prepared.input_groups.drift is not None:
                prepared = self._compensate_(prepared, self._decided_compensation(block, batch, tile.names))
        return prepared

    def _prepared_for(self, block: BlockInParts, batch: int, tile: Tile) -> _PreparedGroups:
        """The input groups of a tile with their regularizer."""
        prepared = self._factored_for(block, batch, tile)
        if prepared.input_groups.problem is None:
            # Its operator is as large as a Hessian, so it is not made before all that wants memory is over.
            regularized = with_regularizer(prepared.input_groups, prepared.W)
            self._prepared = prepared = dataclasses.replace(prepared, input_groups=regularized)
        return prepared

    def _prepare_(self, block: BlockInParts, tile: Tile, statistics: BatchStatistics) -> _PreparedGroups:
        """Factor the Hessians of the input groups of a tile, and keep them for the next call."""
        runner = self._runner
        self._prepared = self._with_betas = None  # makes room
        recipe = runner.recipe(block.unit)
        weights = runner.weights(block.unit, [name for names in tile.members for name in names])
        W = stack([[weights[name] for name in names] for names in tile.members])
        held = HeldColumns.taken_from_(W, tile.members, recipe)
        inputs = InputMoments(
            H=statistics.H.to(runner.device),
            drift=statistics.drift.to(runner.device) if statistics.drift is not None else None,
            lacks_statistics=[fallback == "rtn" for fallback in statistics.fallbacks],
            rounding=statistics.rounding.to(runner.device) if statistics.rounding is not None else None,
        )
        input_groups = factor_input_groups(tile.names, inputs, tile.scheme, recipe)
        self._prepared = _PreparedGroups(tile.names, input_groups, W, held)
        return self._prepared

    def _shares_to_make_up_for(
        self, block: BlockInParts, batch: int, prepared: _PreparedGroups, statistics: BatchStatistics
    ) -> tuple[float, ...]:
        """The share of earlier errors that each input group makes up for: as configured, or as two halves agree."""
        spec, names = self._runner.spec, prepared.names
        if spec.quantization.compensation != "auto":
            return (spec.quantization.compensation,) * len(names)
        if statistics.spread is not None:
            spread = statistics.spread.to(self._runner.device)
            with prepared.held.put_back(prepared.W):
                return tuple(reproducible_share(prepared.input_groups, prepared.W, spread).tolist())
        if len(shares(spec.chunks, spec.shares)) == 1:
            return (USUAL_SHARE,) * len(names)
        # The call was made before and its shares are gone: others go by what it decided then.
        return self._decided_compensation(block, batch, names)

    def _decided_compensation(self, block: BlockInParts, batch: int, names: Sequence[str]) -> tuple[float, ...]:
        decided = block.note(batch, DECISION)["compensation"]
        return tuple(decided[name] for name in names)

    def _compensate_(self, prepared: _PreparedGroups, compensation: tuple[float, ...]) -> _PreparedGroups:
        """Let input groups make up for shares of earlier errors, and keep them so."""
        share = torch.tensor(compensation, dtype=torch.float32, device=prepared.W.device)
        input_groups = dataclasses.replace(prepared.input_groups, share=share)
        self._prepared = dataclasses.replace(prepared, input_groups=input_groups)
        return self._prepared

    def _sample_errors(self, block: BlockInParts, batch: int, tile: Tile) -> torch.Tensor:
        """Errors of the sampled rows of a tile's input groups under every β."""
        samples = [i for i, sample in enumerate(block.sample_tiles(batch)) if sample.names == tile.names]
        errors = [block.load(batch, sample_part(i))[0]["errors"] for i in samples]
        return torch.cat(errors, dim=-1).to(self._runner.device)
