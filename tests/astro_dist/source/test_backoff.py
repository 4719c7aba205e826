"""Waits double up to a limit, the server's wish counts, and what cannot work later is raised at once."""

import pytest

from astro_dist.source.backoff import Backoff


class Refused(Exception):
    """Passes where the server asked for a number of seconds."""

    def __init__(self, asked_s):
        super().__init__("refused")
        self.asked_s = asked_s


def attempts(errors, waits, **limits):
    """Call what raises errors one after the other, and then works; how often it was called."""
    errors = list(errors)

    def call():
        if errors:
            raise errors.pop(0)
        return "done"

    retrying = Backoff(**{"first_s": 1.0, "longest_s": 8.0, **limits}).retrying(
        lambda error: error.asked_s, sleep=waits.append
    )
    assert retrying(call) == "done"
    return retrying.statistics["attempt_number"]


def test_waits_double_up_to_the_longest():
    waits = []
    assert attempts([Refused(0.0)] * 5, waits) == 6
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_server_that_asks_for_more_gets_it():
    waits = []
    attempts([Refused(0.0), Refused(30.0), Refused(3.0)], waits)
    assert waits == [1.0, 30.0, 4.0]


def test_error_that_cannot_pass_is_raised_at_once():
    waits = []
    with pytest.raises(Refused, match="refused"):
        attempts([Refused(None)], waits)
    assert waits == []


def test_interrupt_is_never_tried_again():
    with pytest.raises(KeyboardInterrupt, match="now"):
        attempts([KeyboardInterrupt("now")], [])


def test_last_error_is_raised_after_the_last_attempt():
    waits = []
    with pytest.raises(Refused, match="refused"):
        attempts([Refused(0.0)] * 3, waits, attempts=3)
    assert waits == [1.0, 2.0]


def test_patience_ends():
    with pytest.raises(Refused, match="refused"):
        attempts([Refused(0.0)] * 3, [], patience_s=0.0)
