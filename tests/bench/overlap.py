"""What it gains that chunks are read, computed and written at the same time, and that it costs nothing where it cannot.

    python tests/bench/overlap.py [--disk-ms 40] [--compute-ms 40] [--repeats 3]

A tiny random Llama passes its chunks on, on a CPU: as runs do it, and one step after the other, by turns. A disk takes
so many milliseconds more for each file, and a block for each chunk. Printed are the seconds of the calls `Forward`, the
least of all repeats, and their ratio; once with these delays, and once with none.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.model import block_call
from astro.storage import part_writer
from astro.storage.checked_tensors import save_part
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.schedule.calls import Call, Forward, Result
from astro_dist.worker import block_runner
from astro_dist.worker.chunk_pipeline import ChunkPipeline
from astro_dist.worker.prefetch import Prefetch
from astro_dist.worker.worker import Worker
from tests.support.models import LLAMA, write_checkpoint

CALIBRATION = {
    "samples": 16, "sequence_length": 128, "chunk_samples": 1, "holdout_samples": 0, "token_weights": "norm",
}  # fmt: skip


def wave_s(source: Path, overlaps: bool, disk_s: float, compute_s: float) -> float:
    """Return the seconds that a run's workers spend in `Forward` for blocks whose outputs are written."""
    took = 0.0
    real_do = Worker.do

    def do(self: Worker, call: Call) -> Result:
        nonlocal took
        start = time.perf_counter()
        result = real_do(self, call)
        took += (time.perf_counter() - start) * (isinstance(call, Forward) and call.block < 2)
        return result

    def forward(*args: Any) -> block_call.BlockState:
        time.sleep(compute_s)
        return block_call.forward(*args)

    def save(*args: Any) -> None:
        time.sleep(disk_s)
        save_part(*args)

    patches: list[Any] = [
        mock.patch.object(Worker, "do", do),
        mock.patch.object(block_runner, "forward", forward),
        mock.patch.object(part_writer, "save_part", save),
    ]
    if not overlaps:
        patches += [
            mock.patch.object(ChunkPipeline, "_go_on", return_value=None),
            mock.patch.object(Prefetch, "expect", return_value=None),
        ]
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "model": {"source": str(source)}, "quantization": {"group_size": 32}, "regularizer": {"iterations": 1},
            "calibration": CALIBRATION, "execution": {"executor": "local", "workers": 1, "device": "cpu"},
            "output": {"dir": f"{folder}/run"},
        }  # fmt: skip
        for patch in patches:
            patch.start()
        try:
            pipeline.quantize(RunConfig.model_validate(config))
        finally:
            mock.patch.stopall()
    return took


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disk-ms", type=float, default=40)
    parser.add_argument("--compute-ms", type=float, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| a file takes, ms more | a chunk takes, ms more | overlapped, s | one after the other, s | ratio |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = write_checkpoint(Path(folder) / "llama", transformers.LlamaConfig(**LLAMA))
        for disk_ms, compute_ms in [(options.disk_ms, options.compute_ms), (0.0, 0.0)]:
            least = {True: float("inf"), False: float("inf")}
            for overlaps in [True, False] * options.repeats:
                least[overlaps] = min(least[overlaps], wave_s(source, overlaps, disk_ms / 1e3, compute_ms / 1e3))
            ratio = least[True] / least[False]
            print(f"| {disk_ms:g} | {compute_ms:g} | {least[True]:.2f} | {least[False]:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
