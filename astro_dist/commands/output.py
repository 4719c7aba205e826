"""What commands share: how they print what they found, and options that several of them have."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import astro
from astro_dist.config.model_place import require_model
from astro_dist.console import say

__all__ = [
    "AsJson",
    "Device",
    "Dtype",
    "Trust",
    "begin_with",
    "ignore",
    "print_json",
    "require_runs",
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


def begin_with(*models: str | None) -> None:
    """Say at once which model a command is about, and refuse a path that is not there, before the slow imports.

    Args:
        models: Models as the user wrote them, the one that the command is about first; None for none.
    """
    names = list(filter(None, models))
    say_begin(names[0])
    for name in names:
        require_model(name)


def require_runs(*folders: Path) -> None:
    """Refuse folders that hold no run, before anything slow is imported.

    Args:
        folders: Run directories, or the models in them.

    Raises:
        ConfigError: A folder holds no run that has begun.
    """
    from astro_dist.run_directory.identity import read_identity
    from astro_dist.run_directory.layout import RunLayout

    for folder in folders:
        read_identity(RunLayout.around(folder).root)


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
