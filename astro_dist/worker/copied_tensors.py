"""Tensors from outside the blocks, which are copied to a shard of the result as they are."""

import torch

from astro.errors import CheckpointError
from astro.storage.atomic import save_tensors
from astro_dist.planning.units import CopyUnit
from astro_dist.run_directory.unit_record import CopyResult, UnitRecord
from astro_dist.worker.spec import WorkerSpec

__all__ = ["copy_tensors"]


def copy_tensors(spec: WorkerSpec, unit: CopyUnit) -> UnitRecord:
    """Copy the tensors of a unit.

    Args:
        spec: What the worker was built from.
        unit: The unit.

    Raises:
        CheckpointError: A tensor holds NaN or Inf.
    """
    path, tensors = spec.run.model / unit.file, spec.checkpoint.read(unit.keys)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{spec.checkpoint.place(name)}: tensor {name} holds NaN or Inf")
    save_tensors(path, tensors)
    return spec.run.finish(unit.name, [path], CopyResult(bytes_read=unit.read_bytes))
