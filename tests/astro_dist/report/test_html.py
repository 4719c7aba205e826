"""The report says what the records say, and shows text as text."""

import re
import xml.etree.ElementTree

import pyarrow.parquet
import pytest

from astro.errors import ConfigError
from astro_dist import pipeline
from astro_dist.report.html import write_report
from astro_dist.worker.worker import Worker


def test_report_of_a_finished_run(run_config, tmp_path, monkeypatch):
    real, refusals = Worker.solve_block, iter([True])

    def solve(self, call):
        if next(refusals, False):
            raise RuntimeError("<script>alert(1)</script>")
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    summary = pipeline.quantize(run_config(execution__rounds=2))
    page = write_report(tmp_path / "run").read_text()
    assert "<h1>run: complete</h1>" in page
    for perplexity in (summary.perplexity.original, *(figures.perplexity for figures in summary.rounds)):
        assert f"{perplexity:.3f}" in page
    assert "<script>" not in page
    assert "RuntimeError: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    (drawing,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    lines = xml.etree.ElementTree.fromstring(drawing).findall("polyline")
    assert [len(line.get("points").split()) for line in lines] == [3] * 4
    table = pyarrow.parquet.read_table(tmp_path / "run" / "report" / "layers.parquet").to_pylist()
    assert len(table) == 2 * 3 * 4
    last = [row for row in table if row["round"] == 1]
    assert sum(row["relative_error"] for row in last) / len(last) == pytest.approx(summary.mean_relative_error)


def test_report_of_a_run_that_stopped_early(run_config, tmp_path, monkeypatch):
    def stop(self, call):
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "solve_block", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(run_config())
    page = write_report(tmp_path / "run").read_text()
    assert "run: stopped" in page
    assert "No block is finished yet." in page
    assert not (tmp_path / "run" / "report" / "layers.parquet").exists()


def test_report_names_what_is_damaged(finished):
    (finished / "model" / "config.json").unlink()
    assert "<td>config.json</td>" in write_report(finished).read_text()


def test_report_of_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run.json"):
        write_report(tmp_path)
