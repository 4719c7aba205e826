"""Runs of the command line and of other tools, with their seconds, phases, and the memory of all processes."""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PHASES = ("read", "forward", "hessian", "factor", "beta", "regularize", "grid", "gptq", "refine", "compensate", "write")
_LOOK_S = 1.0
"""The seconds between two looks. For a look the system walks all pages of a process, which costs that process time."""


class TreeMemory(threading.Thread):
    """Watches the memory of a process and of all processes that it starts. Pages that they share count once.

    Attributes:
        peak_bytes: Largest memory so far, in bytes.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._pid, self._done = 0, pid, threading.Event()

    def run(self) -> None:
        """Look again and again, until `finish` is called."""
        while not self._done.wait(_LOOK_S):
            self.peak_bytes = max(self.peak_bytes, sum(_memory_bytes(pid) for pid in _tree(self._pid)))

    def finish(self) -> int:
        """Stop looking, and return the peak in bytes."""
        self._done.set()
        self.join()
        return self.peak_bytes


def _tree(root: int) -> list[int]:
    """The ids of a process and of its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ProcessLookupError):  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    pids = [root]
    for pid in pids:  # the list grows while the loop goes through it
        pids += children.get(pid, [])
    return pids


def _memory_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def our_run(out: Path, assignments: Sequence[str]) -> dict:
    """Run the command line into a fresh folder, and return seconds and memory of the whole command, and phases."""
    shutil.rmtree(out, ignore_errors=True)  # a run that was interrupted would go on, and look faster
    config = out.parent / "empty.yaml"
    config.write_text("{}")
    command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
    command += [part for assignment in (*assignments, f"output.dir={out}") for part in ("--set", assignment)]
    start = time.perf_counter()
    with out.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        memory = TreeMemory(process.pid)
        memory.start()
        summary = process.communicate()[0]
    seconds, peak = time.perf_counter() - start, memory.finish()
    if process.returncode:
        raise SystemExit(f"{out.with_suffix('.log')}: the run ended with exit code {process.returncode}")
    phases = json.loads(summary)["phases_s"]
    return {"wall_s": seconds, "peak_bytes": peak, "phases_s": phases, "work_s": sum(phases.values())}


def measured_once(path: Path, measure: Callable[[], dict]) -> dict:
    """Return a result from its file, which is measured and written first if it is not there."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def peer_runs(options: argparse.Namespace, model: Path, tokens: Path, out: Path, turn: str) -> dict[str, dict]:
    """Run every other tool once, and return seconds and memory of quantizing, and the perplexity of held-out tokens."""
    results = {}
    for tool, _, python in (peer.partition("=") for peer in options.peer):
        path = out / f"{tool}-{turn}.json"
        measure = functools.partial(_peer_run, options, tool, python, model, tokens, path)
        results[tool] = measured_once(path, measure)
    return results


def _peer_run(options: argparse.Namespace, tool: str, python: str, model: Path, tokens: Path, path: Path) -> dict:
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads}
    job = [str(model), str(tokens), "--bits", str(options.bits), "--group-size", str(options.group_size)]
    command = [python, str(Path(__file__).resolve().with_name("peers.py")), tool, *job]
    place = {"env": environment, "cwd": path.parent}  # some tools write logs into the folder that they run in
    with path.with_suffix(".log").open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=True, **place)  # type: ignore[call-overload]
    return json.loads(done.stdout.splitlines()[-1])
