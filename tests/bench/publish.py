"""What may happen to an upload, and what uploading adds to the time of a run.

    python tests/bench/publish.py faults --folder DIR
    python tests/bench/publish.py overlap --folder DIR [--repeats 3] [--layers 30]

`faults` lets every fault in `tests/support/publish_faults.py` happen to `astro-dist publish`, which runs in a process
of its own with the client as it is installed, and takes the tests' server on loopback for the Hub. `overlap` quantizes
a fabricated checkpoint with two Ray workers, in turns without publishing and with it. The server takes in as many bytes
per second as the run without publishing wrote, from its first shard to its last. Both print Markdown.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from astro_dist import pipeline  # noqa: E402
from astro_dist.config.schema import RunConfig  # noqa: E402
from astro_dist.export.finished_run import FinishedRun  # noqa: E402
from astro_dist.export.inventory import read_inventory, write_inventory  # noqa: E402
from tests.bench.memory import fabricate  # noqa: E402
from tests.bench.sources import QUICK  # noqa: E402
from tests.support.hub_server import HubServer  # noqa: E402
from tests.support.models import LLAMA, files_of, write_checkpoint  # noqa: E402
from tests.support.publish_faults import FAULTS, published  # noqa: E402

FILES = 30
# hidden, intermediate, heads, heads of keys and values, vocabulary
SIZES = (768, 2048, 12, 6, 3000)


def environment(hub: HubServer) -> dict[str, str]:
    """Return an environment in which a command takes the server for the Hub."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_bench"}
    return {**os.environ, **settings}


def begin(run: Path, hub: HubServer) -> subprocess.Popen:
    """Start `astro-dist publish`."""
    command = [sys.executable, "-m", "astro_dist", "publish", str(run), "--repo", "org/model"]
    return subprocess.Popen(command, env=environment(hub), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def end(process: subprocess.Popen) -> int:
    """Wait for the end of a command, and return its exit code."""
    process.communicate()
    return process.returncode


def finished_run(folder: Path) -> Path:
    """Make a run of a tiny model, and let its result grow to `FILES` files."""
    source = write_checkpoint(folder / "llama", transformers.LlamaConfig(**LLAMA))
    config = {
        "model": {"source": str(source), "name": "org/llama"}, "quantization": {"group_size": 32},
        "calibration": {"samples": 6, "sequence_length": 48, "chunk_samples": 4, "holdout_samples": 3},
        "execution": {"executor": "local", "workers": 1, "device": "cpu"}, "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    pipeline.quantize(RunConfig.model_validate(config))
    run = FinishedRun.open(folder / "run").run
    names = [file.name for file in read_inventory(run)]
    more = [f"model-x{number:03d}.safetensors" for number in range(FILES - len(names))]
    for name in more:
        (run.model / name).write_bytes(os.urandom(40_000))
    write_inventory(run, [*names, *more], {})
    return run.root


def row(label: str, codes: list[int], commits: list[int], equal: bool) -> None:
    """Print one line of the table."""
    ends, made = " then ".join(map(str, codes)), " then ".join(map(str, commits))
    print(f"| {label} | {ends} | {made} | {'yes' if equal else '**no**'} |", flush=True)


def is_equal(hub: HubServer, run: Path) -> bool:
    """Tell whether the server has the files of the model and no others."""
    return published(hub, "org/model") == files_of(run / "model", with_card=True)


def try_fault(fault, run: Path) -> None:
    """Let one fault happen, and run the command once more if it failed."""
    hub = HubServer()
    hub.write_faults[fault.kind] = list(fault.meets)
    codes, commits = [end(begin(run, hub))], [len(hub.commits)]
    if codes[0]:
        hub.write_faults.clear()
        codes.append(end(begin(run, hub)))
        commits.append(len(hub.commits))
    row(fault.label, codes, commits, is_equal(hub, run))
    hub.close()


def try_kill(run: Path) -> None:
    """Kill the command when ten shards are at the Hub and the next is on its way."""
    hub = HubServer()
    hub.bytes_per_s = 200_000
    process = begin(run, hub)
    while len(list(hub.objects.iterdir())) < 10 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1)  # what was on its way has come in
    held, commits = sum(path.stat().st_size for path in hub.objects.iterdir()), [len(hub.commits)]
    hub.bytes_per_s, hub.uploaded = None, 0
    codes = [process.returncode, end(begin(run, hub))]
    commits.append(len(hub.commits))
    shards = sum(path.stat().st_size for path in (run / "model").glob("*.safetensors"))
    sent = hub.uploaded / (shards - held)
    row(f"kill -9 in the middle; again, it sends {sent:.2f} of what was missing", codes, commits, is_equal(hub, run))
    hub.close()


def try_two(label: str, run: Path, other: Path) -> None:
    """Run two publishers at the same time."""
    hub = HubServer()
    hub.bytes_per_s = 100_000
    both = [begin(run, hub), begin(other, hub)]
    codes = [end(process) for process in both]
    winner = run if codes[0] == 0 else other
    row(label, codes, [len(hub.commits)], is_equal(hub, winner))
    hub.close()


def faults(folder: Path, only: str) -> None:
    """Print the table of faults."""
    original = finished_run(folder)
    print("| what happens | exit code | visible commits | files equal |\n|---|---|---|---|", flush=True)
    for number, fault in enumerate(FAULTS):
        if only in fault.label:
            try_fault(fault, shutil.copytree(original, folder / f"run-{number}"))
    if only in "kill -9":
        try_kill(shutil.copytree(original, folder / "killed"))
    if only in "two publishers":
        try_publishers(original, folder)


def try_publishers(original: Path, folder: Path) -> None:
    """Try two publishers of one model, and of two models."""
    one, two, three = (shutil.copytree(original, folder / name) for name in ("one", "two", "three"))
    try_two("two publishers of one model at once", one, two)
    (three / "model" / "model-x000.safetensors").write_bytes(os.urandom(40_000))
    opened = FinishedRun.open(three).run
    write_inventory(opened, [file.name for file in read_inventory(opened)], {})
    try_two("two publishers of different models at once", one, three)


def quantize(source: Path, run: Path, hub: HubServer | None) -> tuple[float, dict]:
    """Run the command line, and return its seconds and its summary."""
    shutil.rmtree(run, ignore_errors=True)
    settings = [*QUICK, f"model.source={source}", f"output.dir={run}"] + (["publish.repo=org/model"] if hub else [])
    empty = run.parent / "empty.yaml"
    empty.write_text("{}")
    command = [sys.executable, "-m", "astro_dist", "quantize", str(empty), "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    since = time.perf_counter()
    variables = environment(hub) if hub else None
    with (run.parent / ("publishing.log" if hub else "alone.log")).open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=variables, cwd=ROOT, check=True)
    return time.perf_counter() - since, json.loads(done.stdout)


def pace(run: Path) -> float:
    """Return how many bytes of shards a run finished per second, from the first shard to the last."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    ends = sorted(
        line["time"] for line in lines if line["event"] == "finished" and line["unit"].startswith("round-0-block")
    )
    size = sum(path.stat().st_size for path in (run / "model").glob("*.safetensors"))
    return size * (len(ends) - 1) / len(ends) / (ends[-1] - ends[0])


def overlap(folder: Path, repeats: int, layers: int) -> None:
    """Print what publishing adds to a run."""
    source, run = folder / f"source-{layers}", folder / "run"
    if not (source / "tokenizer.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        # Apart: a process begins with the peak of the one that starts it.
        maker = multiprocessing.get_context("spawn").Process(target=fabricate, args=(source, SIZES, layers))
        maker.start()
        maker.join()
        assert maker.exitcode == 0
    print(
        "| seconds without | seconds with | MB/s of the server | MB sent | after the last block, s "
        "| driver MB without, with | added |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    added = []
    for _ in range(repeats):
        alone_s, summary = quantize(source, run, None)
        alone_bytes = summary["peak_rss_bytes"]["driver"]
        hub = HubServer()
        hub.chunk_bytes, hub.bytes_per_s = 1 << 20, pace(run)
        with_s, summary = quantize(source, run, hub)
        equal = published(hub, "org/model") == files_of(run / "model", with_card=True)
        added.append(with_s / alone_s - 1)
        print(
            f"| {alone_s:.1f} | {with_s:.1f} | {hub.bytes_per_s / 1e6:.2f} | {hub.uploaded / 1e6:.0f} | "
            f"{summary['publish']['seconds']:.1f} | {alone_bytes / 1e6:.0f}, "
            f"{summary['peak_rss_bytes']['driver'] / 1e6:.0f} | {added[-1]:+.1%} "
            f"{'' if equal else '**files differ** '}|",
            flush=True,
        )
        hub.close()
    print(f"\nmedian: {statistics.median(added):+.1%}")


def main() -> None:
    """Parse, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["faults", "overlap"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of what happens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30, help="of the fabricated model: how long a run takes")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.what == "faults":
        faults(folder, options.only)
    else:
        overlap(folder, options.repeats, options.layers)


if __name__ == "__main__":
    main()
