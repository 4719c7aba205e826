"""The adapter beside a model: joined from the corrections that a run wrote for each block, and read layer by layer."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Self

from astro.errors import CheckpointError
from astro.formats.peft_adapter import CONFIG_NAME, FOLDER, WEIGHTS_NAME, adapter_config, layer_of, pack_names, unpack
from astro.model.low_rank import LowRank
from astro.model.skeleton import Skeleton
from astro.storage.atomic import parse_json, write_json
from astro.storage.byte_store import Store
from astro.storage.checkpoint import Checkpoint
from astro.storage.joined_tensors import join_tensors
from astro.storage.shard_header import read_bytes, read_store_header
from astro_dist.planning.units import Plan
from astro_dist.run_directory.records import RunDirectory
from astro_dist.schedule.names import block_unit
from astro_dist.source.resolve import Source

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "AdapterFile", "write_adapter"]

ADAPTER_WEIGHTS = f"{FOLDER}/{WEIGHTS_NAME}"
"""Path of the adapter's weights in the folder of the model."""
ADAPTER_CONFIG = f"{FOLDER}/{CONFIG_NAME}"
"""Path of the adapter's configuration in the folder of the model."""


def write_adapter(run: RunDirectory, plan: Plan, repository: str | None) -> list[str]:
    """Join the corrections of all blocks into one adapter in the folder of the model, without holding any of them.

    Args:
        run: Run directory.
        plan: Units of the run, all of them finished.
        repository: ORG/NAME of the repository that the model goes to; None where there is none.

    Returns:
        Paths of the files in the folder of the model; none where no block has a correction.

    Raises:
        DamagedError: The record of a block cannot be read.
    """
    written = {file.name for unit in plan.blocks for file in run.files(block_unit(run.rounds - 1, unit.index))}
    parts = [run.corrections(run.rounds - 1, unit.file) for unit in plan.blocks]
    parts = [part for part in parts if str(part.relative_to(run.root)) in written]
    if not parts:
        return []
    tensors = join_tensors(run.model / ADAPTER_WEIGHTS, parts)
    ranks = {layer_of(tensor.name): min(tensor.shape) for tensor in tensors}
    write_json(run.model / ADAPTER_CONFIG, adapter_config(ranks, repository))
    return [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """The adapter of a model, whose headers are read.

    Attributes:
        checkpoint: Tensors of the adapter.
        ranks: Rank of the correction of each layer by the name of its module.
    """

    checkpoint: Checkpoint
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, source: Source) -> Self | None:
        """Open the adapter of a model.

        Args:
            source: Where the files of the model are.

        Returns:
            The adapter; None where the model has none.

        Raises:
            CheckpointError: A file of the adapter is missing or damaged, or asks for something else than corrections.
        """
        sizes = _sizes(source)
        if not sizes:
            return None
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name not in sizes:
                raise CheckpointError(f"{source.store}/{name}: is missing; an adapter is both files, fetch it again")
        entries = {entry.name: entry for entry in read_store_header(source.store, sizes, ADAPTER_WEIGHTS)}
        factors = {key: entry.shape for key, entry in entries.items()}
        ranks = {layer_of(key): min(shape) if len(shape) == 2 else 0 for key, shape in factors.items()}
        _require_config(source.store, sizes[ADAPTER_CONFIG], ranks)
        return cls(Checkpoint(source.store, entries), ranks)

    def by_block(self, skeleton: Skeleton) -> dict[int, list[str]]:
        """Return the names of the layers that are corrected by the index of their block.

        Args:
            skeleton: The model.

        Raises:
            CheckpointError: The adapter corrects what is no layer in a block of the model.
        """
        blocks: dict[int, list[str]] = {}
        for name in self.ranks:
            weight = f"{name}.weight"
            index = skeleton.block_of(weight) if skeleton.shape_of(weight) is not None else None
            if index is None:
                raise CheckpointError(
                    f"{self.checkpoint.store}/{ADAPTER_WEIGHTS}: corrects {name}, which is no layer in a block of the "
                    "model; adapter and model are of different runs"
                )
            blocks.setdefault(index, []).append(name)
        return blocks

    def corrections(self, names: Iterable[str]) -> dict[str, LowRank]:
        """Read the corrections of some layers; those that have none are left out.

        Args:
            names: Names of the layers' modules.

        Raises:
            CheckpointError: A factor is missing or damaged.
        """
        wanted = [key for name in names if name in self.ranks for key in pack_names(name)]
        try:
            return unpack(self.checkpoint.read(key for key in wanted if key in self.checkpoint.entries))
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.store}/{ADAPTER_WEIGHTS}: {error}") from error


def _sizes(source: Source) -> dict[str, int]:
    """Return the size of each file of a model's adapter that is there, in bytes by path."""
    if source.is_remote:
        known = source.remote_sizes
        return {name: known[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name in known}
    paths = {name: source.folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}


def _require_config(store: Store, size: int, ranks: Mapping[str, int]) -> None:
    """Refuse a configuration by which the adapter would be something else than the sum of its corrections."""
    place = f"{store}/{ADAPTER_CONFIG}"
    content = parse_json(read_bytes(store, ADAPTER_CONFIG, 0, size), place)
    expected = adapter_config(ranks, None) if ranks else {}
    for key in ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
        if content.get(key) != expected.get(key):
            raise CheckpointError(
                f"{place}: expected {key} {expected.get(key)!r:.200}, as the ranks in {WEIGHTS_NAME} ask, got "
                f"{content.get(key)!r:.200}"
            )
