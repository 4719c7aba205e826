"""What `status` says of a run that goes on, was stopped, or is complete."""

import fcntl
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from astro.errors import ConfigError, StorageError
from astro_dist import cli, pipeline
from astro_dist.config.schema import ModelConfig
from astro_dist.planning.outlook import Outlook
from astro_dist.report.command_output import next_lines, status_lines
from astro_dist.report.status import Progress, read_status
from astro_dist.run_directory.journal import Journal
from astro_dist.run_directory.summary import read_summary
from astro_dist.worker.worker import Worker


def test_complete_run(run_config, tmp_path):
    pipeline.quantize(run_config())
    status = read_status(tmp_path / "run")
    assert (status.state, status.in_flight, status.retries) == ("complete", (), ())
    assert status.units.done == status.units.total
    assert status.blocks == Progress(3, 3)
    assert status.damaged == ()


def test_files_of_a_complete_run_that_are_gone_or_cut_off(run_config, tmp_path):
    pipeline.quantize(run_config())
    shard, *_ = sorted((tmp_path / "run" / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "run" / "model" / "config.json").unlink()
    assert sorted(read_status(tmp_path / "run").damaged) == sorted(["config.json", shard.name])
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path / "run")])
    assert "complete, but damaged: 3 of 3 blocks" in shown.output
    assert f"damaged: config.json, {shard.name} (gone, or of another size than was written, or" in shown.output
    pipeline.quantize(run_config())
    assert read_status(tmp_path / "run").damaged == ()


def test_run_that_goes_on(run_config, tmp_path, monkeypatch):
    seen = []
    real = Worker.solve_block

    def solve(self, call):
        with (tmp_path / "run" / "lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        seen.append(read_status(tmp_path / "run"))
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    monkeypatch.setattr(Outlook, "seconds_left", property(lambda self: 5000.0))
    pipeline.quantize(run_config())
    last = seen[-1]
    assert (last.state, last.workers) == ("running", 1)
    assert last.blocks == Progress(2, 3)
    assert [doing.unit for doing in last.in_flight] == ["round-0-block-0002"]
    assert 4900 < last.seconds_left <= 5000
    assert "in flight: block 3 of 3 on worker 0 for 0 s" in status_lines(last)


def test_stopped_run_names_what_was_retried(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "solve_block", lambda self, call: {}["x"])
    with pytest.raises(Exception, match="KeyError"):
        pipeline.quantize(run_config(execution__max_retries=0))
    status = read_status(tmp_path / "run")
    assert (status.state, status.workers, status.seconds_left) == ("stopped", 0, None)
    assert status.retries[0].unit == "round-0-block-0000"
    assert "retried: block 1 of 3, solve block on worker 0 (raised): KeyError: 'x'" in status_lines(status)
    assert "words" not in status.to_json()


def test_folder_that_holds_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run.json, so it is no run directory"):
        read_status(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{}", "names no run"), ("{", "is not known which run")])
def test_mark_that_says_nothing(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_status(tmp_path)


def test_journal_lines_that_a_full_disk_refused_are_written_later(run_config, tmp_path, monkeypatch):
    real, refusals = Journal.note, iter([True] * 3)

    def note(self, event, **details):
        if event not in ("opened", "started") and next(refusals, False):
            raise StorageError("journal.jsonl: cannot be written: No space left on device")
        real(self, event, **details)

    monkeypatch.setattr(Journal, "note", note)
    pipeline.quantize(run_config())
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines if line["event"] == "finished"].count("embed") == 1
    assert lines == sorted(lines, key=lambda line: line["time"])


def test_status_of_a_finished_run_says_its_figures_and_what_is_next(run_config, tmp_path):
    summary = pipeline.quantize(run_config())
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path / "run")]).output.splitlines()
    assert shown[0] == "complete: 3 of 3 blocks, 10 of 10 units done"
    assert shown[1].startswith(f"Hold-out perplexity {summary.perplexity.original:.3f} → ")
    assert shown[2] == summary.perplexity.divergence_in_words
    assert shown[3].endswith(" of the source")
    assert shown[4] == f"Regularized before they were rounded: {12 - summary.betas.get('0', 0)} of 12 groups of layers"
    assert shown[5:7] == ["Next:", f"  astro-dist report {tmp_path / 'run'}"]
    judge = next(line for line in shown if "evaluate" in line)
    run, original = tmp_path / "run", run_config().model.source
    assert judge == f"  astro-dist evaluate {run} --text ANOTHER_TEXT --against {original}"


def test_the_original_to_judge_beside_has_its_revision_and_is_quoted(first_run):
    summary = read_summary(first_run / "summary.json")
    lines = next_lines(summary, Path("a run"), ModelConfig(source="org/model", revision="w 4"))
    assert "  astro-dist evaluate 'a run' --text ANOTHER_TEXT --against 'org/model@w 4'" in lines


def test_status_of_a_damaged_summary_still_says_the_rest(run_config, tmp_path):
    pipeline.quantize(run_config())
    (tmp_path / "run" / "summary.json").write_text("{")
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path / "run")])
    assert (shown.exit_code, len(shown.output.splitlines())) == (0, 1)
