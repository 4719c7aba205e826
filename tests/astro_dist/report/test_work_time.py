"""The timeline says who was at work when, and the bar where the time went."""

import pytest

from astro_dist.report.work_time import phase_parts, timeline
from astro_dist.run_directory.journal import Joined, Opened, Passed, Worked
from astro_dist.run_directory.unit_record import EvaluationResult, UnitRecord
from astro_dist.schedule.unit_words import UnitWords


def worked(worker, unit, begin, end, busy_s):
    return Worked(time=end, worker=worker, unit=unit, begin=begin, end=end, busy_s=busy_s)


def test_idle_time_counts_from_when_a_worker_is_up():
    shown = timeline(
        [
            Opened(time=100.0), Joined(time=110.0, worker=0), Joined(time=110.0, worker=1),
            worked(0, "weights-0001", 110.0, 120.0, 10.0), worked(1, "round-0-block-0000", 110.0, 130.0, 5.0),
            worked(0, "head-original", 120.0, 130.0, 10.0),
        ],
        UnitWords(3),
    )  # fmt: skip
    assert [row.figures for row in shown.rows] == ["busy 100 %, idle 0 s", "busy 25 %, idle 15 s"]
    assert (shown.busy, shown.length) == ("62 %", "30 s")
    first, second = shown.rows[0].stretches
    assert (first.start, first.length, first.busy) == pytest.approx((1 / 3, 1 / 3, 1.0))
    assert [shown.kinds[stretch.kind] for stretch in (first, second)] == [
        "weighing tokens, smoothing",
        "evaluating",
    ]
    assert shown.rows[1].stretches[0].busy == 0.25
    assert first.title == "token weights of block 2 of 3: 10 s of work, from 10 s after the start"


def test_of_many_workers_those_that_were_idle_longest_are_shown():
    events = [worked(worker, "embed", 0.0, 100.0, 100.0 - worker) for worker in range(64)]
    shown = timeline([Opened(time=0.0), *events], UnitWords(3))
    assert [row.worker for row in shown.rows] == list(range(48, 64))
    assert shown.left_out == 48


def test_journal_of_an_earlier_version():
    assert timeline([Opened(time=0.0), Joined(time=1.0, worker=0)], UnitWords(3)) is None
    assert timeline([], UnitWords(3)) is None


def test_phases_add_up():
    record = UnitRecord("evaluate-0000", "", (), EvaluationResult(seconds={"evaluate": 6.0, "gptq": 3.0, "new": 0.5}))
    parts = phase_parts([record], [Passed(time=0.0, seconds=0.5)])
    assert {part.name: round(part.share, 3) for part in parts} == {
        "forward passes": 0.05, "rounding": 0.3, "evaluating": 0.6, "other": 0.05,
    }  # fmt: skip
    assert [round(part.start, 3) for part in parts] == [0.0, 0.05, 0.35, 0.95]
    assert phase_parts([], []) == ()
