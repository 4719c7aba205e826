"""What makes finished shards a model: index, config, tokenizer, card. Nothing that is a shard is touched."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from astro.checkpoint import INDEX_NAME, read_header
from astro.config import Quantization
from astro.files import read_json, write_atomic, write_json, write_text
from astro.formats import LAYOUTS
from astro_dist.budget import layer_settings
from astro_dist.config import RunConfig
from astro_dist.inventory import ModelFile, describe, read_inventory, write_inventory
from astro_dist.manifest import RunDirectory
from astro_dist.plan import Plan
from astro_dist.source import SIDE_FILES

__all__ = ["CARD_NAME", "assemble", "final_settings", "is_whole", "seal"]

CARD_NAME = "README.md"


def assemble(source: Path, plan: Plan, run: RunDirectory, config: RunConfig) -> list[str]:
    """Write what is missing beside the shards, all but the card.

    Args:
        source: folder with config.json and the tokenizer of the source.
        plan: of the run, all of its units finished.
        run: the run directory.
        config: of the run.

    Returns:
        Names of the files that were written.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in plan.files:
        for entry in read_header(run.model, file):
            weight_map[entry.name] = file
            total += entry.size_bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(run.model / INDEX_NAME, index)
    patterns = (*SIDE_FILES, *(("*.py",) if config.model.trust_remote_code else ()))
    beside = sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()})
    for path in beside:
        _copy(path, run.model / path.name)
    content = read_json(source / "config.json")
    settings = final_settings(config.quantization, plan, run)
    content["quantization_config"] = LAYOUTS[config.quantization.format].quantization_config(settings, plan.ignore)
    write_json(run.model / "config.json", content)
    return [INDEX_NAME, "config.json", *(path.name for path in beside)]


def seal(run: RunDirectory, shards: Mapping[str, ModelFile], names: Iterable[str], card: str) -> None:
    """Write the card, then the inventory: the model is whole.

    Args:
        run: the run directory.
        shards: of the model, by name, as their records have them.
        names: of the files beside them.
        card: as it shall read.
    """
    write_text(run.model / CARD_NAME, card)
    write_inventory(run, {*shards, *names, CARD_NAME}, shards)


def is_whole(run: RunDirectory, shards: Mapping[str, ModelFile]) -> bool:
    """Whether everything beside the shards is there as it was written.

    Args:
        run: the run directory.
        shards: of the model, by name, that need not be looked at.
    """
    if not (run.summary.is_file() and run.inventory.is_file()):
        return False
    files = [file for file in read_inventory(run) if file.name not in shards]
    paths = {file: run.model / file.name for file in files}
    return all(path.is_file() and describe(path) == file for file, path in paths.items())


def final_settings(quantization: Quantization, plan: Plan, run: RunDirectory) -> dict[str, Quantization]:
    """Settings of every quantized layer by name, their widths settled: the last round's."""
    settings: dict[str, Quantization] = {}
    for unit in plan.blocks:
        settings |= layer_settings(run, quantization, unit, run.rounds - 1)
    return settings


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda partial: _copy_bytes(source, partial))


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
