"""Damage of the run's own files is told and mended, never taken for a wrong input."""

import json

import pytest

from astro.errors import DamagedError
from astro_dist import pipeline
from astro_dist.report.status import read_status
from astro_dist.run_directory.records import RunDirectory, read_own_json
from astro_dist.run_directory.summary import Summary
from astro_dist.run_directory.unit_record import BlockResult, CopyResult, EmbedResult, UnitRecord

UNIT = "round-0-block-0001"
CORRUPT = {
    "cut short": lambda text: text[:-20],
    "no object": lambda text: "[]",
    "another checksum": lambda text: text.replace('"bits": 4', '"bits": 3'),
    "incomplete": lambda text: "{}",
}


@pytest.fixture
def run(finished):
    return RunDirectory(finished, json.loads((finished / "run.json").read_text())["key"])


@pytest.fixture(params=CORRUPT)
def corrupt(run, request):
    path = run.record(UNIT)
    path.write_text(CORRUPT[request.param](path.read_text()))
    return run


def test_corrupt_record_counts_as_damaged(corrupt):
    with pytest.raises(DamagedError, match=rf"records/{UNIT}\.json"):
        corrupt.read(UNIT, BlockResult)
    with pytest.raises(DamagedError, match=rf"records/{UNIT}\.json"):
        corrupt.files(UNIT)
    with pytest.raises(DamagedError, match=rf"records/{UNIT}\.json"):
        corrupt.require_intact(UNIT)
    assert not corrupt.has_files(UNIT)
    assert not corrupt.is_sound(corrupt.record(UNIT))
    assert corrupt.finished(UNIT) is None


def test_corrupt_record_says_nothing_of_the_files_of_others(corrupt):
    (file,) = corrupt.files("copy-0000")
    assert corrupt.is_sound(corrupt.root / file.name)
    assert corrupt.is_sound(corrupt.record("copy-0000"))


def test_missing_record_is_damaged_and_its_message_speaks_of_no_checkpoint(run):
    with pytest.raises(DamagedError, match=r"records/none\.json: is missing$"):
        run.files("none")
    with pytest.raises(DamagedError, match=r"summary\.json: is missing$"):
        (run.summary.unlink(), read_own_json(run.summary))


def test_figures_of_another_kind_are_damaged(run):
    with pytest.raises(DamagedError, match="holds no CopyResult"):
        run.read("embed", CopyResult)
    assert run.read("embed", EmbedResult).device == "cpu"
    assert run.read_if_there("none", CopyResult) is None


def test_status_tells_of_a_record_that_cannot_be_read(corrupt):
    status = read_status(corrupt.root)
    assert status.damaged == (f"records/{UNIT}.json",)
    assert status.units.done == status.units.total - 1


def test_records_and_summary_come_back_as_they_were_written(run):
    for unit in run.recorded_units():
        content = json.loads(run.record(unit).read_text())
        assert json.loads(json.dumps(UnitRecord.from_json(content).to_json())) == content
    content = json.loads(run.summary.read_text())
    assert json.loads(json.dumps(Summary.from_json(content).to_json())) == content


@pytest.mark.parametrize("name", ["summary.json", "model.json", f"records/{UNIT}.json"])
def test_run_whose_own_file_was_damaged_mends_it(run_config, tmp_path, name, caplog):
    first = pipeline.quantize(run_config())
    path = tmp_path / "run" / name
    path.write_text("{")
    assert pipeline.quantize(run_config()).perplexity == first.perplexity
    assert "damaged: " in caplog.text
    assert json.loads(path.read_text()) != {}
