"""Calls of a worker on one unit make one line of the journal."""

import pytest

from astro_dist import pipeline
from astro_dist.execution import work_log
from astro_dist.execution.work_log import WorkLog
from astro_dist.run_directory.journal import Journal, Worked
from astro_dist.worker.worker import Worker


def test_calls_of_one_unit_are_one_line(monkeypatch):
    now, lines = iter([0.0, 1.0, 3.0, 4.0, 10.0, 12.0]), []
    monkeypatch.setattr(work_log.time, "time", lambda: next(now))
    log = WorkLog(lambda event, **details: lines.append((event, details)))
    for unit in ("a", "a", "b"):
        log.began(0, unit)
        log.ended(0)
    log.ended(0)  # no call goes on
    assert lines == [("worked", {"worker": 0, "unit": "a", "begin": 0.0, "end": 4.0, "busy_s": 2.0})]
    log.close()
    assert lines[1:] == [("worked", {"worker": 0, "unit": "b", "begin": 10.0, "end": 12.0, "busy_s": 2.0})]


def test_a_call_that_goes_on_ends_with_the_log(monkeypatch):
    now, lines = iter([0.0, 5.0]), []
    monkeypatch.setattr(work_log.time, "time", lambda: next(now))
    log = WorkLog(lambda event, **details: lines.append(details["busy_s"]))
    log.began(3, "a")
    log.close()
    assert lines == [5.0]


@pytest.mark.parametrize("fails", [False, True])
def test_journal_of_a_run_says_who_worked_on_every_unit(run_config, tmp_path, monkeypatch, fails):
    real = Worker.solve_block

    def solve(self, call):
        if fails and call.block == 1:
            raise ValueError("singular")
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    try:
        pipeline.quantize(run_config(execution__workers=2))
    except Exception:
        assert fails
    worked = Journal(tmp_path / "run" / "journal.jsonl").of_kind(Worked)
    units = {event.unit for event in worked}
    assert {"embed", "round-0-block-0000", "round-0-block-0001"} <= units
    assert ("head-round-0" in units) is not fails
    assert all(0 <= event.busy_s <= event.end - event.begin + 2e-3 for event in worked)
