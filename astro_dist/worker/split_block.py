"""A block that several workers solve: how it is cut into parts, and the files in which these are handed on.

Layers that share an input are a group; groups of one shape are solved side by side, as a batch; a tile is some rows of
a batch. All of it follows from the model and the settings, so that it does not matter who does which.
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
from astro.quantization import beta_search
from astro.quantization.block import apart, side_by_side
from astro.quantization.grid import Grid, QuantizedLinear
from astro.quantization.input_group import merge_rows
from astro.quantization.layer_record import LayerRecord
from astro.quantization.row_solver import Figures, InputGroupOutcome, SolvedRows
from astro.storage.checked_tensors import load_part, read_part_note, save_part
from astro.timing import add_seconds
from astro_dist.planning.units import BlockUnit
from astro_dist.run_directory.layer_widths import layer_schemes
from astro_dist.schedule.calls import BatchParts
from astro_dist.schedule.names import DECISION, SUM, part_file, share_part, tile_part
from astro_dist.worker.spec import WorkerSpec

__all__ = ["BlockInParts", "Tile"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some rows of groups side by side: their scheme, the members of each, rows of their stack or of its sample."""

    scheme: LayerScheme
    members: tuple[tuple[str, ...], ...]
    rows: slice

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the groups."""
        return tuple("+".join(names) for names in self.members)


class BlockInParts:
    """One block in one round, as a worker knows it.

    Attributes:
        round_index: of the run.
        unit: the block.
        schemes: Scheme of each layer by name.
        layout: stages of the block's forward, each of groups, each of names of layers that share an input.
        batches: groups that are solved side by side.
        stages: indices of the batches of each runner.
    """

    def __init__(self, spec: WorkerSpec, round_index: int, unit: BlockUnit) -> None:
        """Know of a block what the plan says: how its layers share inputs is yet to be laid out."""
        self._spec = spec
        self.round_index, self.unit = round_index, unit
        self.schemes = layer_schemes(spec.run, spec.quantization, unit, round_index)
        self.layout: list[list[list[str]]] = []
        self.batches: list[list[list[str]]] = []
        self.stages: list[list[int]] = []
        self._device_type = torch.device(spec.device).type
        self._solved: dict[int, tuple[dict[str, QuantizedLinear], list[LayerRecord]]] = {}

    def lay_out(self, stages: Sequence[Sequence[Sequence[str]]]) -> None:
        """Learn which layers share inputs, stage by stage, and form the batches."""
        shapes = {linear.name: (linear.rows, linear.columns) for linear in self.unit.linears}
        self.layout = [[list(names) for names in groups] for groups in stages]
        for groups in self.layout:
            together = side_by_side(groups, shapes, self.schemes, self._device_type)
            self.stages.append(list(range(len(self.batches), len(self.batches) + len(together))))
            self.batches += [[groups[i] for i in batch] for batch in together]

    def columns(self, batch: int) -> int:
        """Width of the inputs of a batch."""
        return self.unit.by_name[self.batches[batch][0][0]].columns

    def parts(self, batch: int) -> BatchParts:
        """The calls that a batch takes once its Hessians are merged."""
        return BatchParts(batch, len(self.sample_tiles(batch)), len(self.tiles(batch)))

    def tiles(self, batch: int) -> list[Tile]:
        """Of all rows."""
        return self._cut(batch, row_tiles)

    def sample_tiles(self, batch: int) -> list[Tile]:
        """Of the sampled rows, where β is searched."""
        return self._cut(batch, beta_search.sample_tiles) if self._spec.regularization.is_searched else []

    def solved(self, batch: int) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        """Layers and records of a batch whose tiles are all solved."""
        if batch not in self._solved:
            parts: dict[tuple[str, ...], list[tuple[Tile, SolvedRows, list[InputGroupOutcome]]]] = {}
            for number, tile in enumerate(self.tiles(batch)):
                parts.setdefault(tile.names, []).append((tile, *self._read_tile(batch, number, tile.scheme)))
            layers: dict[str, QuantizedLinear] = {}
            records = []
            for tiles in parts.values():
                quantized, own = self._merged(batch, tiles)
                layers |= quantized
                records += own
            self._solved[batch] = (layers, records)
        return self._solved[batch]

    def save(self, batch: int, part: str, tensors: Mapping[str, torch.Tensor], note: Any) -> None:
        """Write a part of a batch. With what is first fed of the first one goes the layout."""
        if batch == 0 and part in (SUM, share_part(0)):
            note = {**note, "layout": self.layout}
        save_part(self._path(batch, part), tensors, json.dumps(note))

    def load(self, batch: int, part: str) -> tuple[dict[str, torch.Tensor], Any]:
        """Tensors and note of a part of a batch.

        Raises:
            DamagedError: it is missing, or not as it was written.
        """
        tensors, note = load_part(self._path(batch, part))
        return tensors, json.loads(note)

    def note(self, batch: int, part: str) -> Any:
        """The note of a part alone.

        Raises:
            DamagedError: it is missing, or not as it was written.
        """
        return json.loads(read_part_note(self._path(batch, part)))

    def is_there(self, batch: int, part: str) -> bool:
        """Lists the folder, as `RunDirectory.present` does, because another machine may be yet to write the file."""
        path = self._path(batch, part)
        return path in path.parent.glob("*")

    def _cut(self, batch: int, tiles: Callable[[int, int, str, int], list[slice]]) -> list[Tile]:
        cut = []
        for scheme, stacks in apart(self.batches[batch], self.schemes):
            shapes = [self.unit.by_name[name] for name in stacks[0]]
            rows, members = sum(linear.rows for linear in shapes), tuple(tuple(names) for names in stacks)
            own = tiles(rows, shapes[0].columns, self._device_type, len(stacks))
            cut += [Tile(scheme, members, part) for part in own]
        return cut

    def _merged(
        self, batch: int, tiles: Sequence[tuple[Tile, SolvedRows, list[InputGroupOutcome]]]
    ) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
        tile, counts = tiles[0][0], self.note(batch, SUM)
        rows = [[(name, self.unit.by_name[name].rows) for name in names] for names in tile.members]
        by_group = zip(*(outcomes for _, _, outcomes in tiles), strict=True)
        outcomes = [_agreed(name, own) for name, own in zip(tile.names, by_group, strict=True)]
        solved = [solved for _, solved, _ in tiles]
        layers, records = merge_rows(rows, solved, outcomes, counts["num_tokens"])
        measured = self.note(batch, DECISION)["width_errors"]
        for i, record in enumerate(records):
            errors = {int(bits): error for bits, error in measured[record.name].items()}
            counted = {"routed_tokens": counts["routed_tokens"][i], "fallback": counts["fallback"][i]}
            records[i] = dataclasses.replace(record, width_errors=errors, **counted)
        return layers, records

    def _read_tile(self, batch: int, number: int, scheme: LayerScheme) -> tuple[SolvedRows, list[InputGroupOutcome]]:
        tensors, note = self.load(batch, tile_part(number))
        group_size = scheme.columns_per_group(tensors["Q"].shape[-1])
        grid = Grid(tensors["scale"], tensors["zero"], scheme.bits, group_size, scheme.symmetric)
        figures = Figures(**{field.name: tensors[field.name] for field in dataclasses.fields(Figures)})
        return SolvedRows(tensors["Q"], grid, figures), [InputGroupOutcome(**outcome) for outcome in note]

    def _path(self, batch: int, part: str) -> Path:
        return self._spec.run.partial(self.round_index, self.unit.index, part_file(batch, part))


def _agreed(name: str, outcomes: Sequence[InputGroupOutcome]) -> InputGroupOutcome:
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
