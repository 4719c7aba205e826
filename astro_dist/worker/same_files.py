"""Whether a worker's machine sees the files that the driver sees."""

import platform

from astro.errors import RunError
from astro.storage.checkpoint import Checkpoint
from astro_dist.run_directory.local_activations import require_same_activations
from astro_dist.worker.spec import WorkerSpec

__all__ = ["require_same_files"]


def require_same_files(spec: WorkerSpec) -> None:
    """Refuse a machine that sees another run directory or another source under the same path.

    Args:
        spec: What the worker is built from.

    Raises:
        RunError: The run directory, the folder of activations or the source is missing here, or another one.
    """
    if not (spec.run.root / "run.json").is_file():
        raise RunError(f"{platform.node()}: does not see {spec.run.root}; output.dir must be a folder all nodes see")
    if spec.run.local is not None:
        require_same_activations(spec.run.local, spec.activations_stamp)
    store = spec.checkpoint.store
    if store.revision is None and Checkpoint.open(store).fingerprint() != spec.fingerprint:
        raise RunError(f"{platform.node()}: {store} is not the checkpoint that the driver sees under this path")
