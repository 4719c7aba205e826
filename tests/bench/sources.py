"""What a run reads from a Hub, and what its cache takes on disk, with two Ray workers on this machine.

    python tests/bench/sources.py --folder DIR [--model SMOLLM2] [--only blocks ...] [--cache-share 1.1]

The tests' Hub server on loopback serves a fabricated checkpoint of 16 blocks with the proportions of a 70B, and SMOLLM2
if it is given, to `astro-dist quantize`. The cache may take a quarter of a checkpoint. The script counts the bytes that
are asked of the files with weights (index, headers, tensors), and measures the folder of the cache every 20 ms. It
prints Markdown, where 1.00 means that every byte of the checkpoint was asked for once.
"""

import argparse
import bisect
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from astro.storage.checkpoint import INDEX_NAME, Checkpoint  # noqa: E402
from tests.bench.memory import fabricate  # noqa: E402
from tests.support.hub_server import HubServer  # noqa: E402

# hidden, intermediate, heads, heads of keys and values, vocabulary
SIZES, LAYERS = (1024, 2816, 16, 8, 3000), 16
POLL_S = 0.02
MODES = {
    "blocks": [],
    "rounds: 2": ["execution.rounds=2"],
    "sequential": ["execution.mode=sequential"],
}
# What is read does not depend on how well it is quantized.
QUICK = [
    "quantization.group_size=64", "quantization.scale_search=mse", "quantization.refine_passes=0",
    "regularizer.name=none", "calibration.samples=8", "calibration.sequence_length=128", "calibration.chunk_samples=2",
    "calibration.holdout_samples=2", "execution.workers=2", "execution.device=cpu",
]  # fmt: skip


class Watched:
    """Watches the size of a folder's files while it is open, and keeps the largest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest_bytes = folder, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            # Names of one moment: what comes while sizes are read is not added to what it took the place of.
            size = 0
            for name in os.listdir(self.folder) if self.folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    path = self.folder / name
                    size += path.stat().st_size if path.is_file() else 0
            self.largest_bytes = max(self.largest_bytes, size)


def requested_bytes(requests: list, checkpoint: Checkpoint) -> Counter:
    """Count the bytes of weights' files that were asked for: heads of shards and the index, blocks, and all others."""
    files: dict[str, list] = {}
    for entry in sorted(checkpoint.stored.values(), key=lambda entry: entry.start):
        files.setdefault(entry.file, []).append(entry)
    kinds: Counter = Counter()
    for file, span in requests:
        if file == INDEX_NAME:
            kinds["head"] += span[1] - span[0] + 1
        elif file in files:
            after = bisect.bisect_right([entry.start for entry in files[file]], span[0])
            kinds[kind_of(files[file][after - 1].name) if after else "head"] += span[1] - span[0] + 1
    return kinds


def kind_of(name: str) -> str:
    """Return the kind of a tensor by its name."""
    return "block" if ".layers." in name else "outside"


def measure(name: str, source: Path, mode: str, folder: Path, cache_share: float) -> None:
    """Run the command line once, and print its row."""
    run, cache = folder / "run", folder / "cache"
    for path in (run, cache):
        shutil.rmtree(path, ignore_errors=True)
    checkpoint = Checkpoint.open(source)
    sizes = Counter()
    for entry in checkpoint.entries.values():
        sizes[kind_of(entry.name)] += entry.size_bytes
    bound = int(cache_share * sizes.total())
    config = folder / "empty.yaml"
    config.write_text("{}")
    settings = [
        *QUICK, *MODES[mode], "model.source=org/model", f"model.cache_dir={cache}", f"model.cache_gb={bound / 1e9}",
        f"output.dir={run}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    hub = HubServer()
    hub.publish("org/model", source)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    try:
        with Watched(cache / "pieces") as watched:
            done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT, check=True)
    finally:
        hub.close()
    kinds = requested_bytes(hub.file_requests, checkpoint)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(
        f"| {name}, {total / 1e6:.0f} MB | {mode} | {kinds.total() / total:.3f} | {kinds['head'] / total:.3f} | "
        f"{kinds['block'] / sizes['block']:.3f} | {kinds['outside'] / sizes['outside']:.3f} | "
        f"{watched.largest_bytes / 1e6:.2f} of {bound / 1e6:.2f} | {json.loads(done.stdout)['wall_s']:.0f} |",
        flush=True,
    )


def main() -> None:
    """Fabricate a checkpoint, quantize in every mode, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder with SmolLM2-135M")
    parser.add_argument("--only", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--cache-share", type=float, default=0.25, help="what the cache may hold of the checkpoint")
    options = parser.parse_args()
    folder = options.folder.resolve()
    fabricated = folder / "source"
    if not (fabricated / "tokenizer.json").exists():
        fabricated.mkdir(parents=True, exist_ok=True)
        fabricate(fabricated, SIZES, LAYERS)
    print(
        "| checkpoint | mode | asked / checkpoint | headers and index | each block | outside blocks | largest cache MB "
        "| seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for name, source in {"16 blocks": fabricated, "SmolLM2": options.model}.items():
        for mode in options.only if source else ():
            measure(name, source.resolve(), mode, folder, options.cache_share)


if __name__ == "__main__":
    main()
