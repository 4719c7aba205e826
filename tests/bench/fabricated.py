"""Runs on models of random weights with correlated inputs: how time grows, and what one wide block costs."""

import argparse
import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy import PLAIN
from measured_run import PHASES, measured_once, our_run, peer_runs

_WORDS = 4096
BASE = {"hidden": 512, "intermediate": 1536, "layers": 2, "samples": 16}
GROWTH = {
    "base": {}, "tokens × 2": {"samples": 32}, "tokens × 4": {"samples": 64},
    "width × 2": {"hidden": 1024, "intermediate": 3072}, "layers × 2": {"layers": 4}, "layers × 4": {"layers": 8},
}  # fmt: skip
WIDE = {"hidden": 4096, "intermediate": 14336, "layers": 1, "samples": 32}


def fabricated(out: Path, hidden: int, intermediate: int, layers: int) -> Path:
    """Make a checkpoint of random weights whose inputs are correlated, and a text of its words, unless it is there."""
    folder = out / f"source-{hidden}-{intermediate}-{layers}"
    if not (folder / "words.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process makes it, because a run would begin with the memory peak of the process that starts it.
        arguments = (folder, hidden, intermediate, layers)
        maker = multiprocessing.get_context("spawn").Process(target=_fabricate, args=arguments)
        maker.start()
        maker.join()
    return folder


def _fabricate(folder: Path, hidden: int, intermediate: int, layers: int) -> None:
    import torch
    import transformers
    from memory import fabricate
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    heads = hidden // 64
    fabricate(folder, (hidden, intermediate, heads, max(heads // 4, 1), _WORDS), layers)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.embed_tokens.weight" in tensors:
            mix = torch.randn(hidden // 4, hidden) * torch.rand(hidden) ** 2
            low_rank = torch.randn(_WORDS, hidden // 4) @ mix
            tensors["model.embed_tokens.weight"] = (low_rank + 0.1 * torch.randn(_WORDS, hidden)).bfloat16()
            save_file(tensors, path, metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(_WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    # Few words are frequent, most are rare.
    drawn = (_WORDS ** torch.rand(1 << 17, generator=torch.Generator().manual_seed(0))).long() - 1
    (folder / "words.txt").write_text(" ".join(f"w{i}" for i in drawn.tolist()))


def fabricated_run(options: argparse.Namespace, out: Path, shape: Mapping[str, int], changes: Sequence[str]) -> dict:
    """Run the command line on a fabricated model, in one process, and return what was measured."""
    sizes = {**BASE, **shape}
    source = fabricated(options.out, sizes["hidden"], sizes["intermediate"], sizes["layers"])
    return our_run(out, [*_fabricated_settings(options, source, sizes["samples"]), *changes])


def _fabricated_settings(options: argparse.Namespace, source: Path, samples: int) -> list[str]:
    return [
        f"model.source={source}", "model.check_weights=false", f"calibration.source={source / 'words.txt'}",
        f"calibration.samples={samples}", f"calibration.sequence_length={options.sequence_length}",
        "calibration.holdout_samples=0", f"quantization.bits={options.bits}",
        f"quantization.group_size={options.group_size}", "execution.executor=local", "execution.workers=1",
        f"execution.threads_per_worker={options.threads}", "execution.compute_dtype=float32", *options.assignments,
    ]  # fmt: skip


def floor_operations(options: argparse.Namespace, shape: Mapping[str, int]) -> float:
    """Count the operations that a run on a fabricated model needs at least."""
    from floor import configured, count, shape_of

    sizes = {**BASE, **shape}
    source = fabricated(options.out, sizes["hidden"], sizes["intermediate"], sizes["layers"])
    config = configured(None, source, _fabricated_settings(options, source, sizes["samples"]))
    return sum(need.operations for need in count(shape_of(source, config, 4), config).values())


def growth(options: argparse.Namespace) -> None:
    """Print how time grows with tokens, width and depth, one at a time."""
    results: dict[str, list[dict]] = {}
    for turn in range(options.turns):
        for number, (name, shape) in enumerate(GROWTH.items()):
            out = options.out / f"growth-{number}-turn-{turn}"
            measure = lambda out=out, shape=shape: fabricated_run(options, out, shape, [])  # noqa: E731
            results.setdefault(name, []).append(measured_once(out.with_suffix(".json"), measure))
    base = floor_operations(options, {})
    print("| | seconds at work | times the base | least operations, times the base | peak GB |\n|---|---|---|---|---|")
    for name, runs in results.items():
        ratio = statistics.median(
            one["work_s"] / other["work_s"] for one, other in zip(runs, results["base"], strict=True)
        )
        seconds, peak = statistics.median(one["work_s"] for one in runs), max(one["peak_bytes"] for one in runs)
        least = floor_operations(options, GROWTH[name]) / base
        print(f"| {name} | {seconds:.1f} | {ratio:.2f} | {least:.2f} | {peak / 1e9:.2f} |")


def wide(options: argparse.Namespace) -> None:
    """Print the time of one wide block, with β searched and as plain GPTQ, beside the time of other tools."""
    ways = {"auto": [], "plain GPTQ": PLAIN}
    results: dict[str, list[dict]] = {}
    for turn in range(options.turns):
        for name, changes in ways.items():
            out = options.out / f"wide-{name.replace(' ', '-')}-turn-{turn}"
            measure = lambda out=out, changes=changes: fabricated_run(options, out, WIDE, changes)  # noqa: E731
            results.setdefault(name, []).append(measured_once(out.with_suffix(".json"), measure))
        source = fabricated(options.out, WIDE["hidden"], WIDE["intermediate"], WIDE["layers"])
        tokens = options.out / f"wide-auto-turn-{turn}" / "tokens.safetensors"
        for tool, result in peer_runs(options, source, tokens, options.out, f"wide-{turn}").items():
            results.setdefault(tool, []).append(result)
    print("| | " + " | ".join((*PHASES, "at work", "all", "peak GB")) + " |\n" + "|---" * (len(PHASES) + 4) + "|")
    for name, runs in results.items():
        cells = [""] * (len(PHASES) + 1)
        if "phases_s" in runs[0]:
            parts = [{**dict.fromkeys(PHASES, 0.0), **one["phases_s"], "at work": one["work_s"]} for one in runs]
            cells = [f"{statistics.median(one[part] for one in parts):.1f}" for part in (*PHASES, "at work")]
        last = (statistics.median(one["wall_s"] for one in runs), max(one["peak_bytes"] for one in runs) / 1e9)
        print(f"| {name} | " + " | ".join((*cells, *(f"{value:.1f}" for value in last))) + " |")
