"""Perplexity with rounded inputs, smoothed and corrected: section Rounded inputs of README.md here.

    python tests/bench/activations.py MODEL TEXT.parquet --out DIR --grid 4:-1 --inputs int8 int4

It runs the command line once for each row, one after the other, with the settings of `accuracy.py`. Runs that are
finished in DIR are not repeated. It prints one table in Markdown. FP8 inputs are no default, because vLLM takes them
with `--grid 4:128` alone, and other grids are refused.
"""

import argparse
from collections.abc import Iterator

from accuracy import distances, job_parser, our_run, parsed

INPUTS = {
    "16 bits": [],
    "int8": ["activations.bits=8"],
    "fp8": ["activations.bits=8", "activations.type=float"],
    "int4": ["activations.bits=4"],
}
SMOOTHING = {
    "plain": [],
    "ASER's channels": ["activations.smoothing=aser"],
    "SmoothQuant": ["activations.smoothing=smoothquant"],
}
TITLES = [
    "inputs", "smoothing", "rank", "perplexity", "perplexity grows by", "KL divergence, nats a token",
    "same first choice", "adapter, bytes", "more multiplications",
]  # fmt: skip


def table_parser() -> argparse.ArgumentParser:
    """Return the parser of this script's command line."""
    parser = job_parser(__doc__.splitlines()[0])
    parser.add_argument("--grid", default="4:-1", metavar="BITS:GROUP")
    parser.add_argument("--inputs", nargs="+", default=["16 bits", "int8", "int4"], choices=list(INPUTS))
    parser.add_argument("--smoothing", nargs="+", default=list(SMOOTHING), choices=list(SMOOTHING))
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 16, 32, 64])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    return parser


def runs(options: argparse.Namespace) -> Iterator[tuple[str, str, int, list[str]]]:
    """Return inputs, smoothing, rank and changes of the configuration of each row."""
    for inputs in options.inputs:
        for smoothing in options.smoothing if inputs != "16 bits" else ["plain"]:
            for rank in options.ranks:
                changes = [*INPUTS[inputs], *SMOOTHING[smoothing], f"reconstruction.rank={rank}", *options.changes]
                yield inputs, smoothing, rank, changes


def cells(figures: dict) -> list[str]:
    """Return the cells of a run's figures; those of the adapter are empty where it has none."""
    adapter = figures["corrections"]
    sizes = ["", ""]
    if adapter is not None:
        sizes = [f"{adapter['size_bytes']:,}", f"{100 * adapter['weights'] / adapter['layer_weights']:.1f} %"]
    return [f"{figures['quantized']:.2f}", *distances(figures), *sizes]


def main() -> None:
    """Run what is missing, and print the table."""
    options = parsed(table_parser())
    print("| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|")
    for inputs, smoothing, rank, changes in runs(options):
        figures = our_run(options, f"{inputs} {smoothing} {rank}", options.grid, changes)
        print("| " + " | ".join([inputs, smoothing, str(rank), *cells(figures)]) + " |", flush=True)
    print(f"\noriginal: {figures['original']:.3f}")


if __name__ == "__main__":
    main()
