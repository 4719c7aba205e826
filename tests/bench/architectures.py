"""Every architecture that is tested, as a table: python tests/bench/architectures.py [NAME ...]

For each a tiny random checkpoint, written by transformers itself, is streamed, quantized and read again.
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
            found = examine(name, Path(scratch))
        difference = "" if found.difference is None else f"{found.difference:.1e}"
        reloaded = f"no: {UNREADABLE[name]}" if name in UNREADABLE else "yes" if found.reloaded else "incomplete"
        print(f"| {name} | {found.streamed:g} | {found.layers} | {reloaded} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
