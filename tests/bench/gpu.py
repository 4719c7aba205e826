"""What a GPU shows that no CPU can: arithmetic, bytes, kernels, whole blocks, memory, two workers, a peer.

    python tests/bench/gpu.py --out OUT [--seconds 500] [--only machine,arithmetic,...]     # on a machine with a GPU
    python tests/bench/gpu.py --out OUT --device cpu --tiny                       # its own logic, on a CPU, in minutes

Each step is a process of its own with a time limit, so that one that dies or hangs costs itself alone. Every finding is
a JSON line in OUT/findings.jsonl, written at once, with what was expected where something is; `ok: false` is a finding
like any other. The steps, in the order of their worth:

| step | what it finds |
|---|---|
| machine | versions, driver, compiler, rates of products and copies, Cholesky batched and one by one |
| arithmetic | each part of the solve against float64 and against the CPU, and twice the same |
| loops | microseconds a column, and of the host alone: plain, compiled, as kernels and as CUDA graphs, by rows |
| attention | its time and the most memory, forward and back, as an 8B and a 70B have it |
| runs | a small model on CPU and GPU: errors within 2 %, bytes the same twice, for every kind of loops |
| block8b, block70b, experts, block405b | a block by phase with clocks that wait, beside plan and floor, and its peak |
| ray | two actors on one GPU: the bytes of one process |
| peer | llm-compressor's own solve of the same layers, where it is installed |

`README.md` beside this file says what a bare machine needs.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
STEPS = {  # the module that has the step, and its seconds at most
    "machine": ("gpu_arithmetic", 50), "arithmetic": ("gpu_arithmetic", 80), "loops": ("gpu_loops", 90),
    "attention": ("gpu_arithmetic", 40),
    "runs": ("gpu_runs", 130), "block8b": ("gpu_runs", 100), "block70b": ("gpu_runs", 130), "ray": ("gpu_runs", 100),
    "experts": ("gpu_runs", 110), "peer": ("gpu_loops", 60), "block405b": ("gpu_loops", 60),
}  # fmt: skip
SETTINGS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What the product sets. Torch reads both once, when it first uses the GPU, which a step may do before the product."""
_LEAST_S = 15
"""Seconds that must be left for a step to begin."""


def main() -> int:
    """Run the steps, one process each, and print how many findings were not ok."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "astro-gpu-bench")
    parser.add_argument("--seconds", type=float, default=500, help="for all steps together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--stretch", type=float, default=1, help="times the limit of each step, for slow machines")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, by comma")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for place in (options.out, options.work):
        place.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if options.step:
        step = getattr(importlib.import_module(STEPS[options.step][0]), options.step)
        step(importlib.import_module("gpu_findings").Bench(options.step, options))
        return 0
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(STEPS):
        parser.error(f"--only: no step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    end = time.monotonic() + options.seconds
    for name in chosen:
        run_step(name, options, end - time.monotonic())
    lines = [json.loads(line) for line in (options.out / "findings.jsonl").read_text().splitlines()]
    bad = [line for line in lines if line.get("ok") is False]
    print(f"{len(lines)} findings, {len(bad)} not ok")
    for line in bad:
        print(f"  {line['step']}, {line['name']}: {line.get('error', 'not what was expected')}")
    return 1 if bad else 0


def run_step(name: str, options: argparse.Namespace, left_s: float) -> None:
    """Run one step in a process of its own, which is killed with its children at the end of its time."""
    found: dict[str, object] = {"step": name, "name": "step"}
    if left_s < _LEAST_S:
        found |= {"skipped": f"{left_s:.0f} s left"}
    else:
        start, log = time.monotonic(), options.out / f"{name}.log"
        command = [sys.executable, __file__, *sys.argv[1:], "--step", name]
        with log.open("wb") as errors:
            child = subprocess.Popen(command, stderr=errors, start_new_session=True)
            try:
                code: int | str = child.wait(min(STEPS[name][1] * options.stretch, left_s))
            except subprocess.TimeoutExpired:
                code = "no result in time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        found |= {"seconds": round(time.monotonic() - start, 1), "ok": code == 0}
        if code:
            last = log.read_text(errors="replace").splitlines()[-8:]
            found |= {"error": f"ended with {code}", "stderr": last}
    with (options.out / "findings.jsonl").open("a") as handle:
        handle.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
