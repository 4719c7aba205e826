"""Perplexity with rounded inputs, smoothed and corrected: section Activations of README.md here.

    python tests/bench/activations.py MODEL TEXT.parquet --out DIR --grid 4:64 --inputs int8 fp8 int4

It runs the command line once for each row, one after the other, with the settings of `accuracy.py`. Runs that are
finished in DIR are not repeated. It prints one table in Markdown.
"""

import json
from pathlib import Path

from accuracy import job_parser, our_run, parsed

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


def main() -> None:
    """Run what is missing, and print the table."""
    parser = job_parser(__doc__.splitlines()[0])
    parser.add_argument("--grid", default="4:64", metavar="BITS:GROUP")
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS), choices=list(INPUTS))
    parser.add_argument("--smoothing", nargs="+", default=list(SMOOTHING), choices=list(SMOOTHING))
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 16, 32, 64])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="changes")
    options = parsed(parser)
    print("| inputs | smoothing | rank | perplexity | KL divergence, nats a token | adapter, MB |\n" + "|---" * 6 + "|")
    for inputs in options.inputs:
        for smoothing in options.smoothing if inputs != "16 bits" else ["plain"]:
            for rank in options.ranks:
                changes = [*INPUTS[inputs], *SMOOTHING[smoothing], f"reconstruction.rank={rank}", *options.changes]
                figures = our_run(options, f"{inputs} {smoothing} {rank}", options.grid, changes)
                adapter = sum(path.stat().st_size for path in _adapter(figures["tokens"].parent)) / 1e6
                print(
                    f"| {inputs} | {smoothing} | {rank} | {figures['quantized']:.2f} | "
                    f"{figures['divergence']:.4f} ± {figures['divergence_error']:.4f} | {adapter:.1f} |",
                    flush=True,
                )
    print(f"\noriginal: {json.dumps(figures['original'])}")


def _adapter(run: Path) -> list[Path]:
    """The files of a run's adapter; none where it has no corrections."""
    return sorted((run / "model" / "adapter").glob("*.safetensors"))


if __name__ == "__main__":
    main()
