"""A table of every architecture that is tested.

    python tests/bench/architectures.py [NAME ...]

For each of them transformers writes a tiny random checkpoint, which is streamed, quantized and read again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.architectures import DENSE, EXPERTS, UNREADABLE, examine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*DENSE, *EXPERTS])
    transformers.utils.logging.set_verbosity_error()
    print("| architecture | streamed against whole | layers packed | reloaded by transformers | logits differ by |")
    print("|---|---|---|---|---|")
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as scratch:
            result = examine(name, Path(scratch))
        difference = "" if result.difference is None else f"{result.difference:.1e}"
        reloaded = f"no: {UNREADABLE[name]}" if name in UNREADABLE else "yes" if result.reloaded else "incomplete"
        print(f"| {name} | {result.streamed:g} | {result.layers} | {reloaded} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
