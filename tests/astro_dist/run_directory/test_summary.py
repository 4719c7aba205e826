"""What was measured on the held-out text has errors, says how many tokens it is of, and is shown with both."""

import dataclasses
import html

import pytest

from astro.model.sequence_figures import SequenceFigures
from astro_dist.evaluation.comparison import Comparison, compare_runs
from astro_dist.export.finished_run import FinishedRun
from astro_dist.report.command_output import figure_lines
from astro_dist.report.comparison_words import comparison_rows
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.report.tiles import tiles
from astro_dist.run_directory.summary import ENOUGH_TOKENS, Perplexity, read_summary
from astro_dist.run_directory.unit_record import LossResult

MEASURED = Perplexity(10.0, 10.5, 4000, 0.05, 0.002, 0.03, 0.001, agreement=0.851, agreement_error=0.006)


def loss_result(agreements, num_tokens=100):
    sequences = tuple(SequenceFigures(num_tokens, 2.0 * num_tokens, 1.0, agreed) for agreed in agreements)
    total = len(sequences) * num_tokens
    return LossResult(negative_log_likelihood=2.0 * total, tokens=total, sequences=sequences)


def test_agreement_has_its_standard_error_over_sequences():
    original = loss_result([100] * 4)
    measured = Perplexity.of(original, loss_result([80, 90, 70, 80]))
    assert measured.agreement == pytest.approx(0.8)
    assert measured.agreement_error == pytest.approx((2 * 0.1**2 / 3) ** 0.5 / 2)  # s / √n of 0.8, 0.9, 0.7, 0.8
    assert Perplexity.of(loss_result([100]), loss_result([80])).agreement_error is None


def test_agreement_is_shown_with_its_error_everywhere(finished):
    summary = dataclasses.replace(read_summary(finished / "summary.json"), perplexity=MEASURED)
    words = "same first choice at 85.1 % ± 0.6 of the tokens"
    assert any(words in line for line in figure_lines(summary))
    assert words in str(dataclasses.replace(FinishedRun.open(finished), summary=summary).card(None))
    quality = tiles(dataclasses.replace(Findings.read(finished), summary=summary))[0]
    assert "same first choice at 85.1 % ± 0.6" in quality.figures[0].detail.replace("\N{NO-BREAK SPACE}", " ")
    (run,) = compare_runs([finished]).runs
    run = dataclasses.replace(run, perplexity=MEASURED)
    assert dict(comparison_rows(Comparison([run], [])))["same first choice"] == ["85.1 % ± 0.6"]


def test_agreement_of_runs_without_its_error_is_shown_bare():
    assert dataclasses.replace(MEASURED, agreement_error=None).agreement_in_words == "85.1 %"
    assert Perplexity(None, None).agreement_in_words == ""


@pytest.mark.parametrize(
    ("tokens", "words"),
    [(None, ""), (ENOUGH_TOKENS - 1, "999 tokens, too few to judge"), (ENOUGH_TOKENS, "1,000 tokens")],
)
def test_under_a_thousand_tokens_are_too_few_to_judge(tokens, words, finished):
    measured = dataclasses.replace(MEASURED, tokens=tokens)
    assert measured.sample_in_words == words
    summary = dataclasses.replace(read_summary(finished / "summary.json"), perplexity=measured)
    (line,) = [line for line in figure_lines(summary) if line.startswith("Hold-out perplexity")]
    assert line.endswith(f"+5.0 % ± 0.2{words and f', {words}'}")
    figure = tiles(dataclasses.replace(Findings.read(finished), summary=summary))[0].figures[1]
    assert figure.detail.endswith(f"10.500{words and f'; {words}'}")


def test_report_of_a_run_says_how_many_tokens_were_measured(finished):
    measured = read_summary(finished / "summary.json").perplexity
    assert measured.agreement_error > 0
    page = html.unescape(write_report(Findings.read(finished)).read_text())
    assert f"; {3 * 47} tokens, too few to judge</span>" in page
