"""Lines that stay, and a spinner below them."""

import io
import re

from rich.console import Console

from astro_dist import console


def test_a_line_takes_the_place_of_the_spinner_which_goes_on_below_it(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=80))
    with console.waiting_for("loading"):
        console.say("something to know")
    assert re.search(r"something to know\n\S*⠋\S* loading\r", terminal.getvalue())  # it is drawn again at once


def test_no_spinner_turns_where_there_is_no_terminal(capsys):
    with console.waiting_for("loading"):
        console.say("something to know")
    assert re.fullmatch(r"\[[\d:]+\] something to know\n", capsys.readouterr().err)
