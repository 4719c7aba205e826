"""Hold-out perplexity of every method, and of other tools, on one model and text: section Accuracy of README.md here.

    python tests/bench/accuracy.py MODEL TEXT.parquet --out DIR --grids 4:64 3:64 4:-1 2:32 \
        --peer llm-compressor=/venvs/llm-compressor/bin/python --peer "auto-round --iters 50=/venvs/auto/bin/python"

It runs the command line once for each row and grid, one after the other. Other tools run `peers.py` in environments of
their own, on the same tokens; what stands behind a tool's name are arguments of `peers.py`. Runs that are finished in
DIR are not repeated. It prints three tables in Markdown: perplexity, seconds, and how far our rows are from the
original.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

NONE, ALIKE = ["regularizer.name=none"], ["calibration.token_weights=none"]
BY_NORM = ["calibration.token_weights=norm"]
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
STAGES, SEQUENTIAL = ["execution.mode=stages"], ["execution.mode=sequential"]
TWO_ROUNDS = ["execution.rounds=2"]
TUNED, LONG_TUNED = ["quantization.tune_steps=40"], ["quantization.tune_steps=160"]
PEERS = Path(__file__).with_name("peers.py")
METHODS = {
    "RTN": ["quantization.method=rtn", "quantization.scale_search=minmax", *ALIKE, *NONE],
    "GPTQ": PLAIN,
    "GPTQ, sequential": [*PLAIN, *SEQUENTIAL],
    "MagR + GPTQ (published solver)": ["regularizer.name=magr", *PAPER],
    "Astro + GPTQ (published solver)": ["regularizer.name=astro", *PAPER],
    "ours, all tokens alike": ALIKE,
    "ours, tokens by their norm": BY_NORM,
    "ours, beta 0": NONE,
    "ours, no refinement": ["quantization.refine_passes=0"],
    "ours, MSE scales": ["quantization.scale_search=mse"],
    "ours, unsigned scales": ["quantization.signed_scales=false"],
    "ours": [],
    "ours, tuned": TUNED,
    "ours, tuned in 160 steps": LONG_TUNED,
    "ours, stages": STAGES,
    "ours, stages, tuned": [*STAGES, *TUNED],
    "ours, stages, tuned in 160 steps": [*STAGES, *LONG_TUNED],
    "ours, 2 rounds": TWO_ROUNDS,
    "ours, 2 rounds, tuned": [*TWO_ROUNDS, *TUNED],
    "ours, 3 rounds": ["execution.rounds=3"],
    "ours, sequential, uncompensated": [*SEQUENTIAL, "quantization.compensation=0"],
    "ours, sequential, compensation 0.25": [*SEQUENTIAL, "quantization.compensation=0.25"],
    "ours, sequential, tokens by their norm": [*SEQUENTIAL, *BY_NORM],
    "ours, sequential": SEQUENTIAL,
    "ours, sequential, tuned": [*SEQUENTIAL, *TUNED],
}


def run_name(name: str, grid: str, seed: int) -> str:
    """Return the name of a run's folder or file, which differs wherever the result may.

    Args:
        name: Name of the row: a method's, or a peer's with its arguments.
        grid: Bits and group size, such as 4:64.
        seed: Seed of the sample of the text; 0 is not named.
    """
    sample = f"-seed{seed}" if seed else ""
    return f"{name.replace(' ', '-')}-{grid.replace(':', 'g')}{sample}"


def our_run(options: argparse.Namespace, name: str, grid: str, changes: list[str]) -> dict:
    """Run the command line once, and return its figures."""
    bits, group_size = grid.split(":")
    out = options.out / run_name(name, grid, options.seed)
    assignments = [
        f"quantization.bits={bits}", f"quantization.group_size={group_size}", f"calibration.samples={options.samples}",
        f"calibration.holdout_samples={options.samples}", f"calibration.source={options.text}",
        f"calibration.sequence_length={options.sequence_length}", f"calibration.seed={options.seed}",
        f"execution.workers={options.workers}", f"model.source={options.model}", f"output.dir={out}",
        "model.check_weights=false", *changes,
    ]  # fmt: skip
    config = options.out / "empty.yaml"
    config.write_text("{}")
    command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
    command += [part for assignment in assignments for part in ("--set", assignment)]
    summary = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    figures = {"tokens": out / "tokens.safetensors", "corrections": summary.get("corrections")}
    return {**figures, "wall_s": summary["wall_s"], **summary["perplexity"]}


def peer_of(text: str) -> tuple[str, list[str], str]:
    """Take apart what `--peer` is given, such as `auto-round --iters 50=/venv/bin/python`.

    Returns:
        The name of the row, the arguments of `peers.py` that it stands for (the tool first), and the interpreter.
    """
    job, equals, python = text.rpartition("=")
    if not equals or not job.split() or not python:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 'TOOL [ARGUMENT ...]=PYTHON'")
    return " ".join(job.split()), job.split(), python


def peer_run(options: argparse.Namespace, peer: tuple[str, list[str], str], grid: str, tokens: Path) -> dict:
    """Run another tool once, and return perplexity and seconds."""
    name, (tool, *arguments), python = peer
    # What our own runs see by their keys: another model, or other tokens.
    inputs = hashlib.sha256(f"{options.model} ".encode() + tokens.read_bytes()).hexdigest()[:12]
    path = options.out / f"{run_name(name, grid, options.seed)}-{inputs}.json"
    if not path.exists():
        bits, group_size = grid.split(":")
        job = ["--bits", bits, "--group-size", group_size, *arguments]
        command = [python, str(PEERS), tool, str(options.model), str(tokens), *job]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        path.write_text(done.stdout.splitlines()[-1])
    result = json.loads(path.read_text())
    return {"quantized": result["perplexity"], "wall_s": result["wall_s"]}


def figure_table(rows: dict[str, dict[str, dict]], grids: list[str], figure: str, form: str) -> str:
    """Return a table of one figure: a row for each method and tool, a column for each grid.

    Args:
        rows: Figures of every run, by row and grid.
        grids: The columns.
        figure: Name of the figure.
        form: How it is written.
    """
    cells = {name: [format(runs[grid][figure], form) for grid in grids] for name, runs in rows.items()}
    return table(["", *grids], [[name, *row] for name, row in cells.items()])


def distance_table(rows: dict[str, dict[str, dict]], grids: list[str]) -> str:
    """Return a table of how far results are from the original, with standard errors; other tools do not say it.

    Args:
        rows: Figures of every run, by row and grid.
        grids: Order of the runs of a row.
    """
    titles = ["", "grid", "perplexity grows by", "KL divergence, nats a token", "same first choice"]
    runs = [(name, grid, rows[name][grid]) for name in rows for grid in grids if "divergence" in rows[name][grid]]
    return table(titles, [[name, grid, *distances(figures)] for name, grid, figures in runs])


def distances(figures: dict) -> list[str]:
    """Return the cells of a run: change of the perplexity, divergence and agreement, with errors where it has some."""
    parts = (("change", 100.0, ".1f", " %"), ("divergence", 1.0, ".4f", ""), ("agreement", 100.0, ".1f", " %"))
    return [_with_error(figures, *part) for part in parts]


def _with_error(figures: dict, name: str, factor: float, form: str, unit: str) -> str:
    value, error = figures[name], figures.get(f"{name}_error")
    if value is None:
        return ""
    return f"{factor * value:{form}}{unit}" + ("" if error is None else f" ± {factor * error:{form}}")


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def job_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every row of a table has in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the sample of the text")
    parser.add_argument("--workers", type=int, default=2)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and make the folder of the runs."""
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def table_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's command line."""
    parser = job_parser(__doc__.splitlines()[0])
    parser.add_argument("--grids", nargs="+", default=["4:64", "3:64", "4:-1", "2:32"], metavar="BITS:GROUP")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--peer", action="append", default=[], type=peer_of, metavar="TOOL [ARGUMENT ...]=PYTHON")
    return parser


def main() -> None:
    """Run what is missing, and print the tables."""
    options = parsed(table_parser())
    rows: dict[str, dict[str, dict]] = {}
    for grid in options.grids:
        for name in options.methods:
            rows.setdefault(name, {})[grid] = our_run(options, name, grid, METHODS[name])
        first = rows[options.methods[0]][grid]
        for peer in options.peer:
            rows.setdefault(peer[0], {})[grid] = peer_run(options, peer, grid, first["tokens"])
    print(f"original: {first['original']:.3f}\n")
    print(figure_table(rows, options.grids, "quantized", ".3f"))
    print(figure_table(rows, options.grids, "wall_s", ".0f"))
    print(distance_table(rows, options.grids))


if __name__ == "__main__":
    main()
