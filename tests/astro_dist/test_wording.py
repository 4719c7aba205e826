"""Shares and counts are written in one way."""

import re
from pathlib import Path

import pytest

from astro_dist.wording import counted, nats, percent

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("share", "written"),
    [(0.42, "42 %"), (1.0, "100 %"), (0.0, "0 %"), (0.0042, "0.4 %"), (0.9996, "over 99.9 %"), (1e-5, "under 0.1 %")],
)
def test_percent_keeps_a_decimal_place_at_the_ends(share, written):
    assert percent(share) == written


def test_percent_with_sign_and_digits():
    assert percent(0.0596, 1, signed=True) == "+6.0 %"
    assert percent(-0.0596, 2, signed=True) == "-5.96 %"
    assert percent(-0.0001, 1, signed=True) == "0.0 %"


def test_small_divergences_have_an_exponent():
    assert (nats(0.0922), nats(0.0), nats(2.34e-6)) == ("0.0922", "0.0000", "2.3e-06")


def test_counted_takes_the_plural_but_for_one():
    assert (counted(1, "round"), counted(2, "round"), counted(1200, "entry", "entries")) == (
        "1 round", "2 rounds", "1,200 entries",
    )  # fmt: skip


def test_nothing_writes_a_percentage_or_a_plural_of_its_own():
    paths = [*(ROOT / "astro_dist").rglob("*.py"), *(ROOT / "astro_dist").rglob("*.j2")]
    plural, share = re.compile(r"\b[a-z]+\(s\)[ ,;.]"), re.compile(r"\{[^{}]*:[^{}]*%\}|%%|\{100 \*[^{}]*\} %")
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not plural.search(text), path
        assert not share.search(text), path
