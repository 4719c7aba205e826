"""The report says what the records say, and shows text as text."""

import re
import xml.etree.ElementTree

import pyarrow.parquet
import pytest
import transformers
from typer.testing import CliRunner

from astro.errors import ConfigError
from astro_dist import cli, pipeline
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.worker.worker import Worker
from tests.support.models import write_checkpoint


def page_of(root):
    return write_report(Findings.read(root)).read_text()


def drawings(page):
    return [xml.etree.ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_report_of_a_finished_run(run_config, tmp_path, monkeypatch):
    real, refusals = Worker.solve_block, iter([True])

    def solve(self, call):
        if next(refusals, False):
            raise RuntimeError("<script>alert(1)</script>")
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    summary = pipeline.quantize(run_config(execution__rounds=2))
    page = page_of(tmp_path / "run")
    assert "<h1>llama</h1>" in page
    assert '<li class="state complete">complete</li>' in page
    for perplexity in (summary.perplexity.original, *(figures.perplexity for figures in summary.rounds)):
        assert f"{perplexity:.3f}" in page
    assert "<script" not in page
    assert "RuntimeError: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    strips = [drawing for drawing in drawings(page) if drawing.get("aria-label", "").startswith("Output error of")]
    assert [len(strip.findall("rect")) for strip in strips] == [1 + 3] * 4  # an empty one below three blocks
    table = pyarrow.parquet.read_table(tmp_path / "run" / "report" / "layers.parquet").to_pylist()
    assert len(table) == 2 * 3 * 4
    last = [row for row in table if row["round"] == 1]
    assert sum(row["relative_error"] for row in last) / len(last) == pytest.approx(summary.mean_relative_error)


def test_every_drawing_has_a_text_or_is_hidden_from_readers(finished):
    for drawing in drawings(page_of(finished)):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"


def test_page_loads_nothing(finished):
    page = page_of(finished)
    assert not re.search(r"<(script|link rel=.stylesheet|img|iframe)|url\(|@import", page)
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) <= {"data:,"}


def test_report_of_a_run_that_stopped_says_why_and_how_to_go_on(run_config, tmp_path, monkeypatch):
    real = Worker.solve_block

    def solve(self, call):
        return {}["<b>"] if call.block == 2 else real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    with pytest.raises(Exception, match="KeyError"):
        pipeline.quantize(run_config(execution__max_retries=0))
    page = page_of(tmp_path / "run")
    assert "It stopped before it was finished" in page
    assert "block 3 of 3, solve block on worker 0: KeyError: &#39;&lt;b&gt;&#39;" in page
    assert f"astro-dist quantize {tmp_path / 'run' / 'config.yaml'}</pre>" in page
    shown = CliRunner().invoke(cli.app, ["report", str(tmp_path / "run")]).output
    assert "Verdict: not finished: stopped, 2 of 3 blocks done." in shown


def test_report_of_a_run_that_was_interrupted_before_a_block(run_config, tmp_path, monkeypatch):
    def stop(self, call):
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "solve_block", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(run_config())
    page = page_of(tmp_path / "run")
    assert "it was interrupted, or its process was ended" in page
    assert "No block is finished yet." in page
    assert not (tmp_path / "run" / "report" / "layers.parquet").exists()


def test_report_names_what_is_damaged(finished):
    (finished / "model" / "config.json").unlink()
    assert "<li><code>config.json</code></li>" in page_of(finished)


def test_report_of_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run.json"):
        Findings.read(tmp_path)


def test_command_says_verdict_worst_layer_and_fallbacks(finished):
    findings = Findings.read(finished)
    worst = max(findings.layers, key=lambda layer: layer.relative_error)
    written, verdict, largest, fallbacks = CliRunner().invoke(cli.app, ["report", str(finished)]).output.splitlines()
    assert written == f"written: {finished / 'report' / 'index.html'}"
    assert verdict.startswith("Verdict: Too few tokens to judge (141 tokens): raise calibration.holdout_samples")
    assert largest.startswith(f"Largest output error: {worst.relative_error:.3g}, {worst.members[0]}")
    assert fallbacks == "Fallbacks: none"


def test_fallbacks_of_experts_come_first_and_name_their_limit(run_config, tmp_path):
    config = transformers.Qwen3MoeConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16,
    )  # fmt: skip
    write_checkpoint(tmp_path / "moe", config)
    pipeline.quantize(run_config(model__source=str(tmp_path / "moe"), experts__min_tokens=100))
    page = page_of(tmp_path / "run")
    assert page.index("Fewer than 100 calibration tokens") < page.index("Quality on held-out text")
    for row in ("median of each block", "largest of each block"):
        assert f"experts: down_proj, {row}</span>" in page
    for command in ("report", "status"):
        shown = CliRunner().invoke(cli.app, [command, str(tmp_path / "run")]).output
        assert "that fewer than 100 calibration tokens reached (experts.min_tokens: 100)" in shown
