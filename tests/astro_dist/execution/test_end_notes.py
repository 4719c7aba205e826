"""The end of a session is noted when it moves, and seldom."""

import pytest

from astro_dist.execution import end_notes
from astro_dist.execution.end_notes import EndNotes


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(end_notes.time, "time", lambda: now[0])
    return now


def test_forecasts_that_agree_make_one_line(clock):
    noted = []
    notes = EndNotes(lambda event, **details: noted.append((event, details["seconds_left"])))
    for left in (None, 600.0, 599.0, 590.0, 300.0):
        notes.saw(left)
        clock[0] += 1
    assert noted == [("foretold", 600.0), ("foretold", 300.0)]
