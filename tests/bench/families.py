"""A table of families of models, each with a tiny checkpoint, or of the checkpoints in a folder.

    python tests/bench/families.py [NAME ...] [--checkpoints DIR] [--vllm-python VLLM_ENVIRONMENT/bin/python]

Each checkpoint is streamed, quantized and read again by transformers; vLLM's own loader is asked where its environment
is given. What fails is told in the cell of the step that failed. `tests/support/families.py` has the families.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro_dist.planning.coverage import MULTI_TOKEN
from tests.support.families import FAMILIES, Examined, examine

LOADER = Path(__file__).parents[1] / "consumers" / "vllm_loader.py"
COLUMNS = ("family", "source", "streamed against whole", "packed", "reloaded", "logits differ by", "vLLM's parameters")
LONGEST = 160
"""Characters of a message that are shown."""
NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Loader:
    """vLLM's loader in its environment, which is asked for one folder after the other."""

    def __init__(self, python: Path) -> None:
        """Start the process; it imports vLLM once.

        Args:
            python: The Python of an environment with vLLM.
        """
        self._process = subprocess.Popen(
            [python, LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, folder: Path, drafter: str | None = None) -> str:
        """Return what became of a checkpoint, in words.

        Args:
            folder: Folder of the result.
            drafter: Method of speculation whose model is loaded in place of the model itself; None for the model.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([str(folder), *([drafter] if drafter else [])]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return self._in_words(answer)
        raise SystemExit(f"vLLM's loader ended; run {LOADER} by hand to see why")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    @staticmethod
    def _in_words(answer: dict) -> str:
        if "error" in answer:
            return f"no: {_shortened(answer['error'])}"
        if answer["unfilled"]:
            return f"no: unfilled: {_kinds(set(answer['unfilled']))}"
        return f"filled, {answer['packed']} packed"


def main() -> None:
    """Print the table, one row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="families, or names of folders in DIR; all where none is given")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="a folder with a folder for each checkpoint")
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment with vLLM for CPUs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loader = Loader(arguments.vllm_python) if arguments.vllm_python else None
    columns = COLUMNS if loader else COLUMNS[:-1]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name, source, scratch in _sources(arguments.names, arguments.checkpoints):
        result = examine(source, scratch)
        cells = [name, *_cells(result), *([_served(loader, source, result)] if loader else [])]
        print(f"| {' | '.join(_shown(cell) for cell in cells)} |", flush=True)
    if loader:
        loader.close()


def _sources(names: list[str], checkpoints: Path | None) -> Iterator[tuple[str, Path, Path]]:
    """Yield a name, the folder of the checkpoint, and a scratch folder that is deleted afterwards."""
    folders = {path.parent.name: path.parent for path in (checkpoints.glob("*/config.json") if checkpoints else ())}
    for name in names or sorted(folders) or FAMILIES:
        with tempfile.TemporaryDirectory() as scratch:
            yield name, folders[name] if folders else FAMILIES[name](Path(scratch) / "source"), Path(scratch) / "work"


def _cells(result: Examined) -> list[str]:
    failed = {step: f"no: {_shortened(message)}" for step, message in result.failures.items()}
    coverage, reloaded = result.coverage, ""
    layout = result.layout or ""
    if coverage and MULTI_TOKEN in coverage.copied_bytes:
        layout += ", with a drafter"
    if result.missing is not None:
        problems = {"missing": result.missing, "unexpected": result.unexpected}
        reloaded = "; ".join(f"{problem}: {_kinds(names)}" for problem, names in problems.items() if names)
        reloaded = f"no: {reloaded}" if reloaded else "yes"
    return [
        failed.get("layout", layout),
        failed.get("streamed", "" if result.streamed is None else f"{result.streamed:.2g}"),
        failed.get("coverage", f"{coverage.share:.1%}" if coverage else ""),
        failed.get("missing", reloaded),
        failed.get("difference", "" if result.difference is None else f"{result.difference:.2g}"),
    ]


def _served(loader: Loader, source: Path, result: Examined) -> str:
    """Say what vLLM's loader makes of the result and of its drafter; where it fails, also what of the source."""
    if result.model is None or result.coverage is None:
        return ""
    answer = loader.ask(result.model)
    if answer.startswith("no"):
        of_source = loader.ask(source)
        answer += "; the source too" if of_source == answer else f"; of the source: {of_source}"
    if MULTI_TOKEN in result.coverage.copied_bytes:
        answer += f"; drafter: {loader.ask(result.model, 'mtp')}"
    return answer


def _kinds(names: Set[str]) -> str:
    """Say how many names there are, and one of each kind, blocks and experts counted together."""
    kinds = sorted({NUMBER.sub(".N", name) for name in names})
    return f"{len(names)} of {len(kinds)} kinds, such as {kinds[0]}"


def _shortened(message: str) -> str:
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}…"


def _shown(cell: str) -> str:
    return " ".join(cell.replace("|", "/").split())


if __name__ == "__main__":
    main()
