"""The configuration of a run that names a model and little else."""

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astro.config import PER_CHANNEL, SERVED_GROUP_SIZES
from astro_dist.config.model_place import require_model
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import assigned_key, make_config

__all__ = ["run_name", "starting_config"]

_log = logging.getLogger("astro_dist")

_GROUP_SIZES = tuple(sorted(SERVED_GROUP_SIZES, reverse=True))
"""Group sizes that are tried, the usual one first."""


def starting_config(source: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Make the configuration of a run from a model and some keys; all others get defaults that suit the model.

    Where no group size is given, the largest of 128, 64 and 32 that divides all layers is taken, for which the
    checkpoint's headers are read. Where no run directory is given, it is named after the model and the grid.

    Args:
        source: Source of the model, as `model.source` takes it.
        assignments: Assignments of the form `section.key=value`, where the value is read as YAML.

    Raises:
        InputError: A key is unknown or wrong, or the model cannot be read.
    """
    content: dict[str, Any] = {"model": {"source": source}, "output": {"dir": "."}}
    config = make_config(content, assignments, source)
    assigned = set(map(assigned_key, assignments))
    if "quantization.group_size" not in assigned:
        require_model(source)
        content["quantization"] = _fitting(_input_widths(config))
        config = make_config(content, assignments, source)
    if "output.dir" not in assigned:
        content["output"]["dir"] = str(Path("runs") / run_name(source, config))
    return make_config(content, assignments, source)


def run_name(source: str, config: RunConfig) -> str:
    """Return a name for the run of a model, such as `Llama-3.1-8B-w4g128`, or `Llama-3.1-8B-w4a8g128`.

    A folder `model` goes by the name of the folder that it is in, which is the run directory of a training.

    Args:
        source: Source of the model.
        config: Configuration of the run.
    """
    quantization, inputs = config.quantization, config.activations.scheme
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = os.path.abspath(folder)  # of `.` too
        place = path.removesuffix("/model") or path
    else:
        place = source.partition("?")[0].removeprefix("demo:")
    model = re.sub(r"[^\w.-]+", "-", place.rstrip("/").rpartition("/")[2])
    bits = f"{quantization.average_bits:g}" if quantization.bits == "auto" else quantization.bits
    group = "" if quantization.group_size == PER_CHANNEL else f"g{quantization.group_size}"
    return f"{model}-w{bits}{inputs.short_name if inputs else ''}{group}"


def _input_widths(config: RunConfig) -> tuple[int, ...]:
    """Return the number of inputs of each linear layer that would be quantized, by the headers of the checkpoint."""
    # They import torch, which a wrong key need not wait for.
    import torch

    from astro.model.skeleton import Skeleton
    from astro.storage.checkpoint import Checkpoint
    from astro_dist.planning.checkpoint_plan import make_plan
    from astro_dist.source.resolve import resolve_source

    source = resolve_source(config.model)
    checkpoint = Checkpoint.open_source(source.store)
    skeleton = Skeleton(source.folder, torch.float32, config.model.trust_remote_code)
    whatever_divides = dataclasses.replace(config.quantization, indivisible="per-channel")
    plan = make_plan(checkpoint, skeleton, whatever_divides)
    return tuple(linear.columns for unit in plan.blocks for linear in unit.linears)


def _fitting(input_widths: Sequence[int]) -> dict[str, Any]:
    """The keys of the section `quantization` that make groups fit layers of these widths."""
    usual = _GROUP_SIZES[0]
    misfits = sorted({columns for columns in input_widths if columns % usual})
    fitting = [size for size in _GROUP_SIZES if all(columns % size == 0 for columns in input_widths)]
    if fitting:
        if misfits:
            _log.info("group size %d, because %d does not divide layers of %d inputs", fitting[0], usual, misfits[0])
        return {"group_size": fitting[0]}
    _log.info("no usual group size divides layers of %d inputs: they get one scale a row", misfits[0])
    return {"group_size": usual, "indivisible": "per-channel"}
