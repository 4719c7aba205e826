"""Runs beside each other show what they cost and lost, and what makes them hard to compare."""

import json
import shutil

import pytest

from astro.errors import ConfigError
from astro_dist.evaluation.comparison import compare_runs
from astro_dist.run_directory.summary import read_summary


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_figures_are_those_of_the_runs(finished):
    (run,) = compare_runs([finished]).runs
    summary = read_summary(finished / "summary.json")
    errors = {}
    for path in (finished / "records").glob("round-0-block-*.json"):
        record = json.loads(path.read_text())
        layers = record.get("layers") or record["result"]["layers"]
        errors |= {layer["name"]: layer["relative_error"] for layer in layers}
    assert (run.worst_layer, run.worst_error) == max(errors.items(), key=lambda item: item[1])
    assert (run.base, run.bits, run.group_size, run.mode) == ("org/llama", 4.0, 32, "blocks")
    assert run.perplexity == summary.perplexity
    assert run.share == summary.bytes_written / summary.bytes_read
    assert (run.fallbacks, run.resumed) == (0, False)
    assert compare_runs([finished, finished]).notes == []


def test_what_makes_runs_hard_to_compare_is_told(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")

    def change(content):
        content |= {"source_sha256": "0", "tokens_sha256": "0", "version": "0.1"}

    changed(other / "run.json", change)
    changed(other / "summary.json", lambda content: content["perplexity"].update(original=3.0))
    changed(other / "summary.json", lambda content: content["fallbacks"].update(damping_raised=["a", "b"]))
    comparison = compare_runs([finished, other])
    assert comparison.runs[1].fallbacks == 2
    models, tokens, versions = comparison.notes
    assert models.startswith("the runs quantized different models")
    assert tokens.endswith("the original's perplexity differs too, so the held-out text does")
    assert "0.1" in versions


def test_folder_without_a_finished_run_is_refused(finished, tmp_path):
    (finished / "summary.json").unlink()
    with pytest.raises(ConfigError, match="its run is not finished"):
        compare_runs([finished])
    with pytest.raises(ConfigError, match="so it is no run directory"):
        compare_runs([tmp_path])
