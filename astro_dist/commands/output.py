"""What commands share: how they print what they found, and options that several of them have."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

import astro
from astro_dist.console import say

__all__ = [
    "AsJson",
    "Device",
    "Dtype",
    "Trust",
    "ignore",
    "print_json",
    "say_begin",
    "say_lines",
    "stream",
]

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
"""The option of a command that programs call too."""
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
"""The option of a command that passes text through a model."""
Dtype = Annotated[str, typer.Option(help="Dtype of forward passes; auto for the model's own.")]
"""The other option of such a command."""
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Code that the model ships may run.")]
"""The option of a command that opens a model."""


def say_begin(subject: str) -> None:
    """Say at once what the command is about: the imports that come next take seconds, on a busy machine many.

    Args:
        subject: Model or configuration, as the user wrote it.
    """
    say(f"astro-dist {astro.__version__}: {subject}")


def say_lines(*lines: str) -> None:
    """Print lines for a person.

    Args:
        lines: The lines; those that begin with two spaces are commands, which are never wrapped.
    """
    console = Console()
    for line in lines:
        # Names of files and layers may hold what rich takes for markup. A command is to be copied as it is, and so is
        # all that no person looks at.
        is_verbatim = line.startswith("  ") or not console.is_terminal
        console.print(line, markup=False, highlight=False, soft_wrap=is_verbatim)


def stream(text: str) -> None:
    """Print a piece of a line at once.

    Args:
        text: The piece.
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def ignore(text: str) -> None:
    """Print nothing of a text that --json will hold.

    Args:
        text: The text.
    """


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object and nothing else.

    Args:
        content: The object.
    """
    typer.echo(json.dumps(content))
