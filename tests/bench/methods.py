"""Hold-out perplexity and time of each method on one model: the README's table of methods.

    python tests/bench/methods.py configs/smollm2-135m-cpu.yaml --bits 4 3 --out DIR

Runs the command line once a row, one after the other, and prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

NONE = ["regularizer.name=none"]
# LLaMA-2's published beta of 5e-5 in units of its own mean group maximum, so that it means the same on other models.
PAPER = ["regularizer.solver=pgd", "regularizer.iterations=200", "regularizer.beta=8e-4"]
ADMM = ["regularizer.solver=admm", "regularizer.iterations=20"]
METHODS = {
    "RTN": ["quantization.method=rtn", *NONE],
    "GPTQ": NONE,
    "Astro + GPTQ (ADMM, beta 5e-5)": [*ADMM, "regularizer.beta=5e-5"],
    "Astro + GPTQ (ADMM, beta 3e-4)": [*ADMM, "regularizer.beta=3e-4"],
    "MagR + GPTQ (200 steps)": ["regularizer.name=magr", *PAPER],
    "Astro + GPTQ (paper: 200 steps)": PAPER,
}


def run(config: str, out: Path, assignments: list[str]) -> dict:
    """One run of the command line; its summary."""
    command = [sys.executable, "-m", "astro_dist", "quantize", config, "--json"]
    for assignment in [*assignments, f"output.dir={out}"]:
        command += ["--set", assignment]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; finished ones are not repeated")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print("| bits | method | original | quantized | mean layer error | wall s |\n|---|---|---|---|---|---|")
    for bits in options.bits:
        for number, (name, changes) in enumerate(METHODS.items()):
            out = options.out / f"w{bits}-{number}"
            summary = run(options.config, out, [*options.assignments, f"quantization.bits={bits}", *changes])
            perplexity = summary["perplexity"]
            print(
                f"| {bits} | {name} | {perplexity['original']:.3f} | {perplexity['quantized']:.3f} "
                f"| {summary['mean_relative_error']:.5f} | {summary['wall_s']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
