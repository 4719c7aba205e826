"""Hold-out perplexity of every method, and of other tools, on one model and text: section Accuracy of README.md here.

    python tests/bench/accuracy.py MODEL TEXT.parquet --out DIR --grids 4:64 3:64 4:-1 2:32 \
        --peer llm-compressor=/venvs/llm-compressor/bin/python --peer gptqmodel=/venvs/gptqmodel/bin/python

It runs the command line once for each row and grid, one after the other. Other tools run `peers.py` in environments of
their own, on the same tokens. Runs that are finished in DIR are not repeated. It prints two tables in Markdown, of
perplexity and of seconds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

NONE, ALIKE = ["regularizer.name=none"], ["calibration.token_weights=none"]
PLAIN = [
    *ALIKE, *NONE, "quantization.scale_search=mse", "quantization.signed_scales=false", "quantization.refine_passes=0",
    "quantization.compensation=0",
]  # fmt: skip
# LLaMA-2's published beta of 5e-5 in units of its own mean group maximum, so that it means the same on other models.
PAPER = [
    *(change for change in PLAIN if change not in NONE),
    "regularizer.solver=pgd",
    "regularizer.iterations=200",
    "regularizer.beta=8e-4",
]
SEQUENTIAL = ["execution.mode=sequential"]
TUNED = ["quantization.tune_steps=40"]
METHODS = {
    "RTN": ["quantization.method=rtn", "quantization.scale_search=minmax", *ALIKE, *NONE],
    "GPTQ": PLAIN,
    "GPTQ, sequential": [*PLAIN, *SEQUENTIAL],
    "MagR + GPTQ (published solver)": ["regularizer.name=magr", *PAPER],
    "Astro + GPTQ (published solver)": ["regularizer.name=astro", *PAPER],
    "ours, all tokens alike": ALIKE,
    "ours, tokens by their norm": ["calibration.token_weights=norm"],
    "ours, beta 0": NONE,
    "ours, no refinement": ["quantization.refine_passes=0"],
    "ours": [],
    "ours, tuned": TUNED,
    "ours, 2 rounds": ["execution.rounds=2"],
    "ours, 3 rounds": ["execution.rounds=3"],
    "ours, sequential, uncompensated": [*SEQUENTIAL, "quantization.compensation=0"],
    "ours, sequential": SEQUENTIAL,
    "ours, sequential, tuned": [*SEQUENTIAL, *TUNED],
}


def our_run(options: argparse.Namespace, name: str, grid: str, changes: list[str]) -> dict:
    """Run the command line once, and return perplexity and seconds."""
    bits, group_size = grid.split(":")
    out = options.out / f"{name.replace(' ', '-')}-{grid.replace(':', 'g')}"
    assignments = [
        f"quantization.bits={bits}", f"quantization.group_size={group_size}", f"calibration.samples={options.samples}",
        f"calibration.holdout_samples={options.samples}", f"calibration.source={options.text}",
        f"calibration.sequence_length={options.sequence_length}", f"execution.workers={options.workers}",
        f"model.source={options.model}", f"output.dir={out}", "model.check_weights=false", *changes,
    ]  # fmt: skip
    config = options.out / "empty.yaml"
    config.write_text("{}")
    command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
    command += [part for assignment in assignments for part in ("--set", assignment)]
    summary = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {"tokens": out / "tokens.safetensors", "wall_s": summary["wall_s"], **summary["perplexity"]}


def peer_run(options: argparse.Namespace, tool: str, python: str, grid: str, tokens: Path) -> dict:
    """Run another tool once, and return perplexity and seconds."""
    path = options.out / f"{tool}-{grid.replace(':', 'g')}.json"
    if not path.exists():
        bits, group_size = grid.split(":")
        script = str(Path(__file__).with_name("peers.py"))
        job = ["--bits", bits, "--group-size", group_size, *options.peer_argument]
        command = [python, script, tool, str(options.model), str(tokens), *job]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        path.write_text(done.stdout.splitlines()[-1])
    result = json.loads(path.read_text())
    return {"quantized": result["perplexity"], "wall_s": result["wall_s"]}


def job_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every row of a table has in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and make the folder of the runs."""
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = job_parser(__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", default=["4:64", "3:64", "4:-1", "2:32"], metavar="BITS:GROUP")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
    parser.add_argument("--peer-argument", action="append", default=[], metavar="ARGUMENT")
    options = parsed(parser)
    rows: dict[str, list[dict]] = {}
    for grid in options.grids:
        for name in options.methods:
            rows.setdefault(name, []).append(our_run(options, name, grid, METHODS[name]))
        tokens = rows[options.methods[0]][-1]["tokens"]
        for peer in options.peer:
            tool, _, python = peer.partition("=")
            rows.setdefault(tool, []).append(peer_run(options, tool, python, grid, tokens))
    print(f"original: {rows[options.methods[0]][0]['original']:.3f}\n")
    for figure, form in (("quantized", ".3f"), ("wall_s", ".0f")):
        print("| | " + " | ".join(options.grids) + " |\n" + "|---" * (len(options.grids) + 1) + "|")
        for name, results in rows.items():
            print(f"| {name} | " + " | ".join(format(result[figure], form) for result in results) + " |")
        print()


if __name__ == "__main__":
    main()
