"""Loaded by every Python process of a cluster under test: lets one call of one worker go wrong, once.

The file named by ASTRO_FAULT says which: {"phase": "solve", "call": 2, "action": "kill" | "hang" | "raise"}.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

PLAN = Path(os.environ.get("ASTRO_FAULT", "/nonexistent"))
PHASES = {
    "reading": ("BlockRunner", "load"),
    "forward": ("BlockRunner", "forward"),
    "Hessian": ("HessianAccumulator", "add_"),
    "solve": ("Worker", "solve_block"),
    "tile": ("SplitSolver", "solve_rows"),
    "write": ("block_files", "write_block"),
    "rename": ("Path", "replace"),  # a file is whole, but not yet under its name
    "record": ("RunDirectory", "finish"),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the methods when the worker's module has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "astro_dist.worker.worker":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for phase in PHASES:
                _wrap(phase)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(phase):
    from astro.calibration.hessian import HessianAccumulator
    from astro_dist.run_directory.records import RunDirectory
    from astro_dist.worker import block_files, block_runner, split_solver, worker

    class_name, method = PHASES[phase]
    owner = {
        "BlockRunner": block_runner.BlockRunner, "SplitSolver": split_solver.SplitSolver, "Worker": worker.Worker,
        "HessianAccumulator": HessianAccumulator,
        "RunDirectory": RunDirectory, "Path": Path, "block_files": block_files,
    }[class_name]  # fmt: skip
    real, calls = getattr(owner, method), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        _maybe_fail(phase, calls[0])
        return real(*args, **kwargs)

    setattr(owner, method, wrapped)


def _maybe_fail(phase, call):
    try:
        fault = json.loads(PLAN.read_text())
        if fault["phase"] != phase or call < fault["call"]:
            return
        PLAN.rename(PLAN.with_suffix(".done"))  # only one process gets it
    except OSError:
        return
    if fault["action"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault["action"] == "hang":
        time.sleep(3600)
    raise RuntimeError("injected")


if PLAN.parent.is_dir():
    sys.meta_path.insert(0, _Finder())
