"""The card of `plan` says at a glance what a run will be."""

import io

import pytest
from rich.console import Console

from astro_dist.report.forecast import plan
from astro_dist.report.plan_card import plan_table


@pytest.fixture
def card(run_config):
    return lambda workers=None, device=None, **changes: str(plan(run_config(**changes), workers, device)).splitlines()


def test_card_for_gpus_says_that_it_was_never_measured(card):
    lines = card(8, "h100")
    assert lines[2].startswith("8 × H100: about ")
    assert "projected, never measured on a GPU" in lines[2]
    assert " of memory a GPU, " in lines[3]


def test_card_for_this_machine(card):
    lines = card()
    assert "weights quantized: " in lines[1]
    assert "1 × CPU worker: about " in lines[2]
    assert "from the speed of this machine" in lines[2]


def test_card_names_the_text_and_says_where_it_is_the_default(card, tmp_path):
    assert card()[0].endswith("calibration 6 × 48 tokens of python-docs, the default text")
    assert card(calibration__source="python-docs")[0].endswith(" tokens of python-docs")
    (tmp_path / "a.txt").write_text("Many words of a text. " * 4000)
    assert card(calibration__source=str(tmp_path / "a.txt"))[0].endswith(f" tokens of {tmp_path / 'a.txt'}")


def test_workers_are_as_many_as_quantize_starts(card, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    on_ray = {"execution__executor": "ray", "execution__workers": "auto"}
    assert "3 × CPU workers: about " in card(**on_ray)[2]
    on_gpus = card(device="h100", **on_ray)
    assert "1 × H100: about " in on_gpus[2]
    assert any(line.startswith("note: planned for one worker") for line in on_gpus)
    assert not any("planned for one" in line for line in [*card(4, "h100", **on_ray), *card(**on_ray)])


def test_workers_without_cores_are_not_counted_as_faster(card, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert any("64 workers on this machine are no faster than 2" in line for line in card(64))
    assert not any("are no faster" in line for line in card(2))


def test_long_runs_on_a_cpu_point_at_gpus(card, monkeypatch):
    assert not any("--device" in line for line in card())
    monkeypatch.setattr("astro_dist.report.plan_card._LONG_S", 0.0)
    assert "`--device h100` and the like foretell it for GPUs" in card()[-1]


def test_table_of_units_names_files_whole_at_80_columns(run_config):
    units = plan(run_config()).prepared.plan
    console = Console(file=io.StringIO(), width=80)
    console.print(plan_table(units))
    shown = console.file.getvalue()
    assert "…" not in shown
    ends = units.blocks[0].file, units.blocks[-1].file
    assert [file.removesuffix(".safetensors") in shown for file in ends] == [True, True]
