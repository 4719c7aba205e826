"""The defaults of `tests/bench/activations.py` are runs that can start, and its rows say what corrections take."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from astro_dist.planning.settings import run_config
from astro_dist.planning.validate import prepare
from tests.bench import test_accuracy


@pytest.fixture
def activations(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # as where the script is run
    return importlib.import_module("tests.bench.activations")


def test_defaults_are_runs_that_can_start(activations, llama):
    options = activations.table_parser().parse_args(["model", "text", "--out", "out"])
    bits, group_size = map(int, options.grid.split(":"))
    rows = list(activations.runs(options))
    assert len(rows) == 4 + 2 * 3 * 4  # no smoothing of inputs in 16 bits
    for _, _, _, changes in rows:
        prepare(run_config(llama, changes, bits=bits, group_size=group_size))


def test_rows_say_what_corrections_take(activations):
    corrections = {"size_bytes": 19600000, "weights": 92, "layer_weights": 1000}
    row = activations.cells({**test_accuracy.FIGURES, "corrections": corrections})
    assert row == ["22.62", "7.0 % ± 0.6", "0.0890 ± 0.0042", "84.4 % ± 0.6", "19,600,000", "9.2 %"]
    bare = activations.cells({**test_accuracy.FIGURES, "corrections": None})
    assert bare[-2:] == ["", ""]
    assert len(bare) + 3 == len(activations.TITLES)


def test_docstring_names_a_section_of_the_page(activations):
    section = activations.__doc__.partition("section ")[2].partition(" of README.md")[0]
    assert f"## {section}\n" in Path(activations.__file__).with_name("README.md").read_text()


def test_commands_on_the_page_are_understood(activations):
    page = Path(activations.__file__).with_name("README.md").read_text()
    commands = re.findall(r"^python tests/bench/activations\.py (.*?[^\\])$", page, re.MULTILINE | re.DOTALL)
    assert len(commands) > 1
    for command in commands:
        options = activations.table_parser().parse_args(shlex.split(command.replace("\\\n", "")))
        assert list(activations.runs(options))
