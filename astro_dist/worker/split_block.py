"""A block that several workers solve: how it is cut into parts, and the files in which workers hand each other parts.

Layers that read one input are an input group. Input groups of one shape are solved side by side, as a batch. A tile is
some rows of a batch. All of this follows from the model and the settings, so that any worker can do any part.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astro.config import LayerScheme
from astro.errors import RunError
from astro.linalg.tiling import row_tiles
from astro.model.cache_scales import CacheScales, LargestByModule
from astro.model.low_rank import LowRank, takes_correction
from astro.quantization import beta_search
from astro.quantization.block import COUNTED, apart, side_by_side
from astro.quantization.corrections import CorrectedGroups, with_corrections
from astro.quantization.grid import Grid, QuantizedLinear
from astro.quantization.input_group import merge_rows
from astro.quantization.layer_record import LayerRecord
from astro.quantization.recipe import Figures, InputGroupOutcome, SolvedRows
from astro.storage.checked_tensors import load_part, read_part_note, save_part
from astro.timing import add_seconds
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.schedule.calls import BatchParts
from astro_dist.schedule.names import CORRECTIONS, DECISION, SUM, part_file, share_part, tile_part
from astro_dist.worker.spec import WorkerSpec

__all__ = ["BlockInParts", "Tile"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some rows of input groups side by side.

    Attributes:
        scheme: Grid of all members.
        members: Names of the layers of each input group.
        rows: Rows of the stacked members, or of the sample of these.
    """

    scheme: LayerScheme
    members: tuple[tuple[str, ...], ...]
    rows: slice

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The name of each input group: those of its members, joined by '+'."""
        return tuple("+".join(names) for names in self.members)


@dataclasses.dataclass(frozen=True)
class _SolvedTile:
    """A tile as it was read back.

    Attributes:
        tile: The tile.
        rows: Its rows on their grid.
        outcomes: What was decided for each input group.
    """

    tile: Tile
    rows: SolvedRows
    outcomes: list[InputGroupOutcome]


class BlockInParts:
    """One block in one round, as a worker knows it.

    Attributes:
        round_index: Index of the round.
        unit: Unit of the block.
        schemes: Grid of each layer by name.
        layout: Stages of the block's forward. Each is a list of input groups, and each of these a list of the names of
            its layers.
        batches: Input groups of each batch.
        stages: Indices of the batches of each stage.
    """

    def __init__(self, spec: WorkerSpec, round_index: int, unit: BlockUnit) -> None:
        """Know of a block what the plan says. Which layers share an input is yet to be laid out.

        Args:
            spec: What the worker was built from.
            round_index: Index of the round.
            unit: Unit of the block.
        """
        self._spec = spec
        self.round_index, self.unit = round_index, unit
        self.schemes = layer_schemes(spec.run, spec.quantization, unit, round_index)
        self.layout: list[list[list[str]]] = []
        self.batches: list[list[list[str]]] = []
        self.stages: list[list[int]] = []
        self._solved: dict[int, tuple[dict[str, QuantizedLinear], list[LayerRecord]]] = {}

    def lay_out(self, stages: Sequence[Sequence[Sequence[str]]]) -> None:
        """Learn which layers share an input, stage by stage, and form the batches.

        Args:
            stages: Input groups of each stage, each as the names of its layers.
        """
        shapes = {linear.name: (linear.rows, linear.columns) for linear in self.unit.linears}
        self.layout = [[list(names) for names in input_groups] for input_groups in stages]
        for input_groups in self.layout:
            together = side_by_side(input_groups, shapes, self.schemes, self._spec.tile_elements)
            self.stages.append(list(range(len(self.batches), len(self.batches) + len(together))))
            self.batches += [[input_groups[i] for i in batch] for batch in together]

    def stage_of(self, batch: int) -> int:
        """Return the index of the stage of a batch."""
        return next(index for index, batches in enumerate(self.stages) if batch in batches)

    def columns(self, batch: int) -> int:
        """Return the width of the inputs of a batch."""
        return self.unit.by_name[self.batches[batch][0][0]].columns

    @functools.cached_property
    def cache_scales(self) -> dict[str, CacheScales]:
        """The scales of an FP8 cache by the attention module's name in the model, once the first batch is merged.

        Raises:
            DamagedError: The statistics of the first batch are missing, or not as they were written.
        """
        return self.largest(0, SUM).scales if self.batches and self._spec.activations.rounds_cache else {}

    def largest(self, batch: int, part: str) -> LargestByModule:
        """Return the largest keys and values that statistics of a batch in the first stage carry.

        Args:
            batch: Index of the batch.
            part: Name of the statistics.

        Raises:
            DamagedError: The part is missing, or not as it was written.
        """
        return LargestByModule.from_json(self.note(batch, part)["largest"])

    def parts(self, batch: int) -> BatchParts:
        """Count the calls that a batch takes once its Hessians are merged."""
        return BatchParts(batch, len(self.sample_tiles(batch)), len(self.tiles(batch)), self.is_corrected(batch))

    def is_corrected(self, batch: int) -> bool:
        """Tell whether a layer of a batch gets a correction of low rank."""
        names = (name for input_group in self.batches[batch] for name in input_group)
        return self._spec.reconstruction.is_on and any(takes_correction(self.unit.by_name[name]) for name in names)

    def tiles(self, batch: int) -> list[Tile]:
        """Cut all rows of a batch into tiles."""
        return self._cut(batch, row_tiles)

    def sample_tiles(self, batch: int) -> list[Tile]:
        """Cut the sampled rows of a batch into tiles; there are none where β is not searched."""
        return self._cut(batch, beta_search.sample_tiles) if self._spec.regularization.is_searched else []

    def solved(self, batch: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Put the tiles of a batch together, all of which are solved.

        Args:
            batch: Index of the batch.

        Returns:
            The layers on their grids by name, and the record of each input group.

        Raises:
            DamagedError: A part is missing, or not as it was written.
            RunError: Tiles were damped differently, or got different betas.
        """
        if batch not in self._solved:
            layers, records = self.rounded(batch)
            if self.is_corrected(batch):
                layers, records = with_corrections(layers, records, self._read_corrections(batch))
            self._solved[batch] = (layers, records)
        return self._solved[batch]

    def rounded(self, batch: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Put the tiles of a batch together, without the corrections of its layers; see `solved`.

        Args:
            batch: Index of the batch.
        """
        by_names: dict[tuple[str, ...], list[_SolvedTile]] = {}
        for index, tile in enumerate(self.tiles(batch)):
            by_names.setdefault(tile.names, []).append(self._read_tile(batch, index, tile))
        layers: dict[str, QuantizedLinear] = {}
        records: list[LayerRecord] = []
        for tiles in by_names.values():
            merged_layers, merged_records = self._merged(batch, tiles)
            layers |= merged_layers
            records += merged_records
        return layers, records

    def members(self, tile: Tile) -> list[list[tuple[str, int]]]:
        """Return the name and the number of rows of each member of a tile's input groups."""
        return [[(name, self.unit.by_name[name].rows) for name in names] for names in tile.members]

    def save_corrections(self, batch: int, corrected: Sequence[CorrectedGroups]) -> None:
        """Write the corrections of a batch.

        Args:
            batch: Index of the batch.
            corrected: Corrections of all input groups of the batch.
        """
        corrections = {name: each for groups in corrected for name, each in groups.corrections.items()}
        tensors = {f"A.{name}": each.A for name, each in corrections.items()}
        tensors |= {f"B.{name}": each.B for name, each in corrections.items()}
        note = {
            "taken": {name: taken for groups in corrected for name, taken in groups.taken.items()},
            "seconds": {name: seconds for groups in corrected for name, seconds in groups.seconds.items()},
            "whole": {name: whole for groups in corrected for name, whole in groups.whole.items()},
        }
        self.save(batch, CORRECTIONS, tensors, note)

    def _read_corrections(self, batch: int) -> CorrectedGroups:
        tensors, note = self.load(batch, CORRECTIONS)
        names = [key.removeprefix("A.") for key in tensors if key.startswith("A.")]
        corrections = {name: LowRank(tensors[f"A.{name}"], tensors[f"B.{name}"]) for name in names}
        whole = {name: (error, energy) for name, (error, energy) in note["whole"].items()}
        return CorrectedGroups(corrections, note["taken"], note["seconds"], whole)

    def save(self, batch: int, part: str, tensors: Mapping[str, torch.Tensor], note: Any) -> None:
        """Write a part of a batch. The first statistics of the first batch carry the layout.

        Args:
            batch: Index of the batch.
            part: Name of the part.
            tensors: Tensors of the part by name.
            note: What goes with the tensors, as JSON types.
        """
        if batch == 0 and part in (SUM, share_part(0)):
            note = {**note, "layout": self.layout}
        save_part(self._path(batch, part), tensors, json.dumps(note))

    def load(self, batch: int, part: str) -> tuple[dict[str, torch.Tensor], Any]:
        """Read the tensors and the note of a part of a batch.

        Args:
            batch: Index of the batch.
            part: Name of the part.

        Raises:
            DamagedError: The part is missing, or not as it was written.
        """
        tensors, note = load_part(self._path(batch, part))
        return tensors, json.loads(note)

    def note(self, batch: int, part: str) -> Any:
        """Read the note of a part, without its tensors.

        Args:
            batch: Index of the batch.
            part: Name of the part.

        Raises:
            DamagedError: The part is missing, or not as it was written.
        """
        return json.loads(read_part_note(self._path(batch, part)))

    def is_there(self, batch: int, part: str) -> bool:
        """Say whether a part was written.

        The folder is listed, as `RunDirectory.present` does, because another machine may be yet to write the file.

        Args:
            batch: Index of the batch.
            part: Name of the part.
        """
        path = self._path(batch, part)
        return path in path.parent.glob("*")

    def _cut(self, batch: int, tiles: Callable[[int, int, int, int], list[slice]]) -> list[Tile]:
        cut: list[Tile] = []
        for scheme, stacks in apart(self.batches[batch], self.schemes):
            shapes = [self.unit.by_name[name] for name in stacks[0]]
            rows, members = sum(linear.rows for linear in shapes), tuple(tuple(names) for names in stacks)
            parts = tiles(rows, shapes[0].columns, self._spec.tile_elements, len(stacks))
            cut += [Tile(scheme, members, part) for part in parts]
        return cut

    def _merged(self, batch: int, tiles: Sequence[_SolvedTile]) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Layers and records of some input groups of a batch, from all of their tiles."""
        tile, counts = tiles[0].tile, self.note(batch, SUM)
        rows = self.members(tile)
        by_input_group = zip(*(solved.outcomes for solved in tiles), strict=True)
        outcomes = [_agreed(name, of_tiles) for name, of_tiles in zip(tile.names, by_input_group, strict=True)]
        layers, records = merge_rows(rows, [solved.rows for solved in tiles], outcomes, counts["num_tokens"])
        decision = self.note(batch, DECISION)
        for i, record in enumerate(records):
            errors = {int(bits): error for bits, error in decision["width_errors"][record.name].items()}
            counted = {key: counts[key][i] for key in COUNTED}
            counted["compensation"] = decision["compensation"].get(record.name, 0.0)
            records[i] = dataclasses.replace(record, width_errors=errors, **counted)
        return layers, records

    def _read_tile(self, batch: int, index: int, tile: Tile) -> _SolvedTile:
        tensors, note = self.load(batch, tile_part(index))
        scheme = tile.scheme
        group_size = scheme.columns_per_group(tensors["Q"].shape[-1])
        grid = Grid(tensors["scale"], tensors["zero"], scheme.bits, group_size, scheme.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        rows = SolvedRows(tensors["Q"], grid, figures)
        return _SolvedTile(tile, rows, [InputGroupOutcome(**outcome) for outcome in note])

    def _path(self, batch: int, part: str) -> Path:
        return self._spec.run.partial(self.round_index, self.unit.index, part_file(batch, part))


def _agreed(name: str, outcomes: Sequence[InputGroupOutcome]) -> InputGroupOutcome:
    """Return what was decided for an input group, the same in every tile, with the seconds of all tiles.

    Args:
        name: Name of the input group.
        outcomes: What was decided for it in each tile.

    Raises:
        RunError: Tiles were damped differently, or got different betas, as other hardware may do.
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
