"""The page of runs beside each other holds what the table holds, and loads nothing."""

import dataclasses
import html
import io
import re

import pytest
from rich.console import Console
from rich.filesize import decimal

from astro_dist import pipeline
from astro_dist.evaluation.comparison import Comparison, compare_runs
from astro_dist.report.comparison_page import write_comparison
from astro_dist.report.comparison_words import comparison_rows, comparison_tables, run_names
from astro_dist.run_directory.summary import Perplexity


def test_page_holds_the_table_and_a_bar_of_every_figure(finished, tmp_path):
    (run,) = compare_runs([finished]).runs
    other = dataclasses.replace(
        run, run="/elsewhere/<b>", worst_error=2 * run.worst_error, perplexity=Perplexity(None, None)
    )
    comparison = Comparison([run, other], ["the runs & their texts differ"])
    write_comparison(comparison, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for title, cells in comparison_rows(comparison):
        assert f'<th scope="row">{title}</th>' in page
        assert all(html.escape(cell) in page for cell in cells)
    assert "the runs &amp; their texts differ" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert not re.findall(r"https?://|<script", page)
    largest = page[page.index("Largest output error of a layer") :]
    assert re.findall(r'class="bar" width="([\d.]+)"', largest)[:2] == ["50.00", "100.00"]
    assert page.count('class="bar"') == 2 + 3 * 2  # one of the runs measured no perplexity


def test_what_servers_round_besides_weights_is_told_if_any_run_has_it(finished):
    (run,) = compare_runs([finished]).runs
    assert "also rounded" not in dict(comparison_rows(Comparison([run, run], [])))
    other = dataclasses.replace(run, also_rounded="inputs int8 per token")
    assert dict(comparison_rows(Comparison([run, other], [])))["also rounded"] == ["-", "inputs int8 per token"]


def test_corrections_are_told_if_any_run_has_them(run_config, finished):
    config = run_config(reconstruction__rank=2)
    pipeline.quantize(config)
    comparison = compare_runs([finished, config.output.dir])
    (size,) = re.findall(r"rank 2, (.*)", dict(comparison_rows(comparison))["corrections"][1])
    assert dict(comparison_rows(comparison))["corrections"][0] == "-"
    assert size == decimal((config.output.dir / "model" / "adapter" / "adapter_model.safetensors").stat().st_size)
    assert "corrections" not in dict(comparison_rows(compare_runs([finished])))


def test_runs_of_one_name_are_told_apart(finished):
    (run,) = compare_runs([finished]).runs
    runs = [dataclasses.replace(run, run=f"/{folder}/run") for folder in "ab"]
    assert run_names(Comparison(runs, [])) == ["/a/run", "/b/run"]
    (table,) = comparison_tables(Comparison(runs, []), 80)
    assert [str(column.header) for column in table.columns][1:] == ["/a/run", "/b/run"]


@pytest.mark.parametrize(("width", "num_tables"), [(80, 2), (140, 1)])
def test_no_cell_of_the_table_breaks(finished, width, num_tables):
    (run,) = compare_runs([finished]).runs
    names = ["Llama-3.1-8B-Instruct-w4g128", "Llama-3.1-8B-Instruct-w3g128", "w4", "w3g32-sequential"]
    comparison = Comparison([dataclasses.replace(run, run=f"/runs/{name}") for name in names], [])
    console = Console(file=io.StringIO(), width=width)
    tables = comparison_tables(comparison, width)
    assert len(tables) == num_tables
    for table in tables:
        console.print(table)
    shown = console.file.getvalue()
    assert all(name in shown for name in names)
    assert all(cell in shown for title, cells in comparison_rows(comparison) for cell in cells)
    assert "model.layers" not in shown
    assert len(shown.splitlines()) == num_tables * (1 + 4 + 11 + 1)  # title, header with empty lines, rows, empty line
