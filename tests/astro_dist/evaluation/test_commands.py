"""The commands evaluate, compare and try as a user runs them."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from astro_dist import cli
from astro_dist.config.schema import TextSource
from astro_dist.evaluation.calibrated_text import calibration_note
from astro_dist.evaluation.words import task_table
from astro_dist.source import long_wait


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["astro-dist", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call


def test_evaluate_says_how_a_result_differs_from_its_source(run, finished, first_run, tmp_path):
    (tmp_path / "text.txt").write_text("some words and more words " * 20)
    options = ("--text", tmp_path / "text.txt", "--window", 32, "--limit", 5)
    code, out, _ = run("evaluate", finished, *options, "--against", first_run.parent / "llama")
    assert code == 0
    assert "in float32 on cpu, block by block" in out
    assert "5 windows of 32 tokens, 360 tokens are left over" in out
    assert "so that it changes by" in out
    assert "KL divergence" in out
    assert "no text" not in out
    code, out, _ = run("evaluate", finished, *options, "--bos", "--json")
    assert code == 0
    text = json.loads(out)["text"]
    assert (text["windows"], text["leading_tokens"]) == (5, 0)  # this tokenizer puts none in front


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to judge by: give --text FILE, --tasks NAMES, or both"),
        (("--tasks", "piqa", "--against", "org/x"), "give --text FILE too"),
        (("--text", "/a.csv"), "--text /a.csv: expected python-docs, a file (*.txt, "),
        (("--text", "a.txt", "--subset", "raw"), "--text a.txt: only a dataset on the Hub has a subset"),
        (("--text", "a.txt", "--device", "tpu"), "--device tpu: expected one of auto, cpu, cuda"),
        (("--text", "a.txt", "--workers", "0"), "--workers 0: expected auto or at least 1"),
        (("--tasks", "piqa", "--workers", "2"), "tasks are run by one process"),
        (("--text", "a.txt", "--dtype", "int4"), "--dtype int4: expected one of"),
        (("--text", "a.txt", "--hidden-gb", "0"), "--hidden-gb 0.0: expected more than 0"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(run, llama, options, message):
    code, _, err = run("evaluate", llama, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_progress_counts_whole_blocks_and_says_which_of_two_models_it_is(run, finished, llama, monkeypatch, command):
    monkeypatch.setattr(long_wait, "_EVERY_S", 0.0)
    text = finished.parent / "text.txt"
    text.write_text("some words and more words " * 20)
    _, _, err = run(command, finished, "--against", llama, "--text", text, "--window", 32, "--limit", 2)
    lines = [line.partition("] ")[2] for line in err.splitlines()]
    assert f"--against {llama}: through 2 of 3 blocks with 1 batch" in lines
    assert f"{finished}/model: through 2 of 3 blocks with 1 batch" in lines


@pytest.mark.parametrize("name", ["run", "run/model"])
def test_evaluate_says_that_the_run_was_calibrated_on_the_text(run, finished, tmp_path, monkeypatch, name):
    (tmp_path / "text.txt").write_text("some words and more words " * 20)
    (tmp_path / "run").symlink_to(finished)
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["calibration"]["source"] = str(tmp_path / "text.txt")
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    options = ("--window", 32, "--limit", 2)
    _, out, _ = run("evaluate", name, "--text", "text.txt", *options)
    note = "note: the run was calibrated on this text, so this flatters it; its hold-out figure is what `astro-dist"
    assert f"{note} status {finished.resolve()}` shows" in " ".join(out.split())
    (tmp_path / "other.txt").write_text("other words and more words " * 20)
    assert "note: " not in run("evaluate", name, "--text", "other.txt", *options)[1]


def test_relative_path_of_a_calibration_text_is_only_known_by_its_name(tmp_path):
    config = {"model": {"source": "m"}, "calibration": {"source": "../x/a.txt"}, "output": {"dir": str(tmp_path)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run.json").write_text("{}")
    notes = [
        calibration_note(str(tmp_path), TextSource(source=f"/texts/{name}", share=1.0)) for name in ["a.txt", "b.txt"]
    ]
    assert notes[0].startswith(
        "the run was calibrated on a file of this name, a.txt; if it is this text, this flatters"
    )
    assert notes[1] is None


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        ({"source": "org/text", "split": "train"}, True),
        ({"source": "org/text", "split": "train", "subset": "en"}, True),
        ({"source": "org/text", "split": "train", "subset": "de"}, False),
        ({"source": "org/text", "split": "test"}, False),
    ],
)
def test_a_dataset_is_the_text_of_calibration_by_name_subset_and_split(tmp_path, text, is_same):
    texts = [{"source": "a.txt", "share": 0.5}, {"source": "org/text", "subset": "en", "share": 0.5}]
    calibration = {"sources": texts, "holdout_samples": 0}
    config = {"model": {"source": "org/model"}, "calibration": calibration, "output": {"dir": str(tmp_path)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run.json").write_text("{}")
    note = calibration_note(str(tmp_path), TextSource(**text, share=1.0))
    assert (note is not None and "it held nothing out" in note) == is_same


def test_compare_prints_a_table(run, finished, first_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("compare", finished, first_run)
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("finished", "perplexity", "KL, nats a token", "worst layer", "fallbacks", "4"):
        assert word in out
    code, out, _ = run("compare", finished / "model", "--json")
    assert json.loads(out)["runs"][0]["bits"] == 4.0


def test_try_shows_both_continuations(run, finished, llama, monkeypatch):
    monkeypatch.setattr(long_wait, "_EVERY_S", 0.0)
    code, out, err = run("try", finished, "Once upon", "--tokens", 4, "--against", llama)
    assert code == 0
    lines = [line.partition("] ")[2] for line in err.splitlines()]
    for what, folder in (("original", llama), ("quantized", finished / "model")):
        said = lines.index(f"{what}: reading {folder}")
        assert lines[said + 1] == f"{folder}: read 1 of 3 blocks", "the first word comes before anything is loaded"
    assert "original: " in out
    assert "quantized: " in out
    assert "tokens" in out.splitlines()[-1]
    code, out, _ = run("try", finished, "Once upon", "--tokens", 4, "--json")
    assert len(json.loads(out)["original"]["tokens"]) == 4


def test_table_of_tasks_keeps_headers_and_figures_whole_at_80_columns():
    score = SimpleNamespace(
        task="mmlu_high_school_government_and_politics", shots=5, metric="exact_match", value=0.12345, error=0.01234,
        samples=14042,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    console.print(task_table(SimpleNamespace(tasks=[score])))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert re.search(r"5  exact_match  0\.1235  0\.0123 +14,042  12\.3", shown)
