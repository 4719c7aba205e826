"""How long a run takes beside other tools, how that grows, and what a wide block costs.

    python tests/bench/speed.py peers MODEL TEXT.parquet --out DIR --turns 3 \
        --peer llm-compressor=/venvs/llm-compressor/bin/python --peer gptqmodel=/venvs/gptqmodel/bin/python
    python tests/bench/speed.py growth --out DIR
    python tests/bench/speed.py wide --out DIR [--peer ...]

With `peers`, the command line and other tools quantize one model from the same tokens with the same number of threads,
in turns, one after the other. Other tools run `peers.py` in environments of their own. Nothing is held out, so that all
of them do the same. Perplexity is measured afterwards, by the same code for all. `growth` and `wide` fabricate models
of random weights with correlated inputs, and run in one process.

Because a machine is never quiet, ratios are taken within a turn, and the median over turns counts. Runs that are
finished in DIR are not repeated. The output is Markdown.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from accuracy import PLAIN, SEQUENTIAL
from fabricated import growth, wide
from measured_run import PHASES, measured_once, our_run, peer_runs

OURS = {"ours, blocks": [], "ours, blocks, plain GPTQ": PLAIN, "ours, sequential": SEQUENTIAL}


def write_tokens(options: argparse.Namespace, path: Path) -> None:
    """Write the tokens that all calibrate on, and those that all are measured on."""
    import transformers
    from safetensors.torch import save_file

    from astro_dist.config.schema import CalibrationConfig
    from astro_dist.source.calibration_text import as_tensors, read_texts, tokenize

    config = CalibrationConfig(
        source=str(options.text), samples=options.samples, holdout_samples=options.samples,
        sequence_length=options.sequence_length,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    save_file(as_tensors(tokenize(read_texts(config, tokenizer), tokenizer, config).chunks), path)


def our_perplexity(options: argparse.Namespace, run: Path, tokens: Path) -> float:
    """Measure the perplexity of our result in plain transformers, and check that its tokens were the common ones."""
    import torch
    from peers import perplexity
    from safetensors.torch import load_file

    from tests.support.dequantized import write_dequantized

    common, ours = load_file(tokens), load_file(run / "tokens.safetensors")
    assert all(torch.equal(common[name], ours[name]) for name in ours), f"{run} took other tokens"
    write_dequantized(options.model, run / "model", run / "dequantized")
    return perplexity(run / "dequantized", {}, torch.cat([common[n] for n in sorted(common) if n[0] == "h"]))


def compare(options: argparse.Namespace) -> None:
    """Run all tools in turns, and print a table of medians and one of our phases."""
    tokens = options.out / "tokens.safetensors"
    if not tokens.exists():
        write_tokens(options, tokens)
    assignments = [
        f"model.source={options.model}", "model.check_weights=false", f"quantization.bits={options.bits}",
        f"quantization.group_size={options.group_size}", f"calibration.source={options.text}",
        f"calibration.samples={options.samples}", f"calibration.sequence_length={options.sequence_length}",
        "calibration.holdout_samples=0", f"execution.workers={options.threads}", *options.assignments,
    ]  # fmt: skip
    results: dict[str, list[dict]] = {}
    for turn in range(options.turns):
        for name in options.ours:
            run = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{turn}"
            job, path = (run, [*assignments, *OURS[name]]), run.with_suffix(".json")
            result = measured_once(path, lambda job=job: our_run(*job))
            if "perplexity" not in result:
                result["perplexity"] = our_perplexity(options, run, tokens)
                path.write_text(json.dumps(result))
            results.setdefault(name, []).append(result)
        for tool, result in peer_runs(options, options.model, tokens, options.out, str(turn)).items():
            results.setdefault(tool, []).append(result)
    print_comparison(results, options)


def print_comparison(results: Mapping[str, list[dict]], options: argparse.Namespace) -> None:
    """Print the medians over turns. Ratios are taken within a turn."""
    first = next(iter(results.values()))
    print(f"{options.bits} bits, group {options.group_size}, {options.samples} × {options.sequence_length} tokens, "
          f"{options.threads} threads, {options.turns} turns\n")  # fmt: skip
    print("| | seconds | times the first row | least to most | peak GB | perplexity |\n|---|---|---|---|---|---|")
    for name, runs in results.items():
        ratios = [one["wall_s"] / other["wall_s"] for one, other in zip(runs, first, strict=True)]
        seconds, peak, perplexity = (
            statistics.median(one[figure] for one in runs) for figure in ("wall_s", "peak_bytes", "perplexity")
        )
        ratio = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {name} | {seconds:.1f} | {ratio} | {peak / 1e9:.2f} | {perplexity:.2f} |")
    ours = {name: runs for name, runs in results.items() if "phases_s" in runs[0]}
    print("\n| seconds of all workers | " + " | ".join(PHASES) + " |\n" + "|---" * (len(PHASES) + 1) + "|")
    for name, runs in ours.items():
        cells = [statistics.median(one["phases_s"].get(phase, 0.0) for one in runs) for phase in PHASES]
        print(f"| {name} | " + " | ".join(f"{seconds:.1f}" for seconds in cells) + " |")


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(required=True)
    for name, action in (("peers", compare), ("growth", growth), ("wide", wide)):
        mode = modes.add_parser(name)
        mode.set_defaults(action=action)
        if action is compare:
            mode.add_argument("model", type=Path)
            mode.add_argument("text", type=Path)
            mode.add_argument("--ours", nargs="+", default=list(OURS), choices=list(OURS))
            mode.add_argument("--samples", type=int, default=32)
        if action is not growth:
            mode.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
        mode.add_argument("--out", type=Path, required=True)
        mode.add_argument("--turns", type=int, default=3)
        threads = {"default": 2, "help": "of every tool; ours are workers of one thread each"}
        mode.add_argument("--threads", type=int, **(threads if action is compare else {"default": 1}))
        mode.add_argument("--bits", type=int, default=4)
        mode.add_argument("--group-size", type=int, default=64)
        mode.add_argument("--sequence-length", type=int, default=512)
        mode.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if hasattr(options, "model"):
        options.model, options.text = options.model.resolve(), options.text.resolve()
    options.action(options)


if __name__ == "__main__":
    main()
