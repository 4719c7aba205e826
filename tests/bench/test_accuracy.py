"""Runs of `tests/bench/accuracy.py` are kept apart by all that makes their results differ, and shown with errors."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from astro_dist.planning.settings import run_config
from tests.bench import accuracy

FIGURES = {
    "quantized": 22.6154, "wall_s": 190.4, "change": 0.0698, "change_error": 0.0061, "divergence": 0.08904,
    "divergence_error": 0.0042, "agreement": 0.8441, "agreement_error": 0.0057,
}  # fmt: skip
PEER = {"quantized": 23.01, "wall_s": 1000.0}


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(out=tmp_path, seed=0, model=Path("model"))


def test_run_names_differ_where_results_may():
    asked = [(name, grid, seed) for name in ("ours", "ours, tuned") for grid in ("4:64", "4:-1") for seed in (0, 1)]
    assert len({accuracy.run_name(*each) for each in asked}) == 8
    assert accuracy.run_name("ours, tuned", "4:64", 0) == "ours,-tuned-4g64"
    assert accuracy.run_name("ours, tuned", "4:64", 1) == "ours,-tuned-4g64-seed1"


def test_a_peer_is_a_tool_with_its_arguments():
    assert accuracy.peer_of("auto-round  --iters 50=/venv/python") == (
        "auto-round --iters 50", ["auto-round", "--iters", "50"], "/venv/python",
    )  # fmt: skip
    assert accuracy.peer_of("auto-round --iters=50=python")[1:] == (["auto-round", "--iters=50"], "python")
    for wrong in ("auto-round", "=python", "auto-round="):
        with pytest.raises(argparse.ArgumentTypeError, match="expected 'TOOL"):
            accuracy.peer_of(wrong)


def test_a_peer_with_other_arguments_or_other_tokens_is_run_anew(options, monkeypatch, tmp_path):
    commands, tokens = [], tmp_path / "tokens"
    tokens.write_bytes(b"one sample")

    def run(command, **_):
        commands.append(command)
        printed = f"a line\n{json.dumps({'perplexity': float(len(commands)), 'wall_s': 1.0})}\n"
        return argparse.Namespace(stdout=printed)

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    few, many = (accuracy.peer_of(f"auto-round --iters {steps}=python") for steps in (50, 200))

    def perplexity(peer):
        return accuracy.peer_run(options, peer, "4:64", tokens)["quantized"]

    assert [perplexity(few), perplexity(many), perplexity(few)] == [1, 2, 1]
    tokens.write_bytes(b"another")
    assert perplexity(few) == 3
    options.model = Path("other")
    assert perplexity(few) == 4
    assert commands[0][2:] == [
        "auto-round", "model", str(tokens), "--bits", "4", "--group-size", "64", "--iters", "50",
    ]  # fmt: skip


def test_the_seed_is_that_of_the_sample(options, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return argparse.Namespace(stdout=json.dumps({"wall_s": 1.0, "perplexity": FIGURES}))

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    parsed = accuracy.table_parser().parse_args(["model", "text", "--out", str(options.out), "--seed", "7"])
    figures = accuracy.our_run(parsed, "ours", "4:64", [])
    assert "calibration.seed=7" in commands[0]
    assert figures["tokens"] == options.out / "ours-4g64-seed7" / "tokens.safetensors"
    assert figures["agreement_error"] == FIGURES["agreement_error"]


def test_tables_have_a_row_for_each_method_and_distances_for_our_own():
    rows = {"ours": {"4:64": FIGURES}, "auto-round --iters 50": {"4:64": PEER}}
    assert accuracy.figure_table(rows, ["4:64"], "quantized", ".3f").splitlines() == [
        "|  | 4:64 |", "|---|---|", "| ours | 22.615 |", "| auto-round --iters 50 | 23.010 |",
    ]  # fmt: skip
    assert accuracy.distance_table(rows, ["4:64"]).splitlines()[2:] == [
        "| ours | 4:64 | 7.0 % ± 0.6 | 0.0890 ± 0.0042 | 84.4 % ± 0.6 |"
    ]


def test_a_run_without_errors_is_shown_without():
    bare = {name: None if name.endswith("_error") else value for name, value in FIGURES.items()}
    assert accuracy.distances(bare) == ["7.0 %", "0.0890", "84.4 %"]
    assert accuracy.distances(dict.fromkeys(FIGURES)) == ["", "", ""]


def test_commands_on_the_page_are_understood():
    page = Path(accuracy.__file__).with_name("README.md").read_text()
    commands = re.findall(r"^python tests/bench/accuracy\.py (.*?[^\\])$", page, re.MULTILINE | re.DOTALL)
    assert commands
    for command in commands:
        options = accuracy.table_parser().parse_args(shlex.split(command.replace("\\\n", "")))
        assert all(peer[1][0] in accuracy.PEERS.read_text() for peer in options.peer)


@pytest.mark.parametrize("name", accuracy.METHODS)
def test_every_row_is_a_run_that_the_configuration_knows(name, llama):
    changed = run_config(llama, accuracy.METHODS[name])
    assert (changed == run_config(llama)) == (name == "ours")
