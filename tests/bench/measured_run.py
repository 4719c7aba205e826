"""One run of the command line, or of another tool: seconds, phases, the memory of all of its processes."""

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
"""Between two looks. The system walks all pages of a process for one, which costs that process time."""


class TreeMemory(threading.Thread):
    """Watches a process and all that it starts; pages that several of them share count once.

    Attributes:
        peak_bytes: the most that was seen.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes, self._pid, self._done = 0, pid, threading.Event()

    def run(self) -> None:
        """Look, until told to end."""
        while not self._done.wait(_LOOK_S):
            self.peak_bytes = max(self.peak_bytes, sum(_own_bytes(pid) for pid in _tree(self._pid)))

    def finish(self) -> int:
        """End; the peak."""
        self._done.set()
        self.join()
        return self.peak_bytes


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ProcessLookupError):  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def _own_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def our_run(out: Path, assignments: Sequence[str]) -> dict:
    """One run of the command line into a fresh folder: seconds and memory of the whole command, phases."""
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


def kept(path: Path, measure: Callable[[], dict]) -> dict:
    """A result that is there already, or is measured now."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def peer_runs(options: argparse.Namespace, model: Path, tokens: Path, out: Path, turn: str) -> dict[str, dict]:
    """One run of every other tool asked for: seconds and memory of quantizing, perplexity where tokens are held out."""
    found = {}
    for tool, _, python in (peer.partition("=") for peer in options.peer):
        path = out / f"{tool}-{turn}.json"
        measure = functools.partial(_peer_run, options, tool, python, model, tokens, path)
        found[tool] = kept(path, measure)
    return found


def _peer_run(options: argparse.Namespace, tool: str, python: str, model: Path, tokens: Path, path: Path) -> dict:
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "GPTQMODEL_CPU_WORKERS": threads}
    job = [str(model), str(tokens), "--bits", str(options.bits), "--group-size", str(options.group_size)]
    command = [python, str(Path(__file__).resolve().with_name("peers.py")), tool, *job]
    own = {"env": environment, "cwd": path.parent}  # some write logs where they are
    with path.with_suffix(".log").open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=True, **own)  # type: ignore[call-overload]
    return json.loads(done.stdout.splitlines()[-1])
