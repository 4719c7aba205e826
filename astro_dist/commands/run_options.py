"""The options that describe a run: a configuration or a model, and the keys that have an option of their own."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from astro_dist.commands.output import say_begin
from astro_dist.console import waiting_for

__all__ = ["takes_run"]

_Target = Annotated[
    str,
    typer.Argument(
        help="YAML file that describes the whole run; or a model: a folder, ORG/NAME on the Hub, or a URL.",
        metavar="CONFIG|MODEL",
    ),
]
_Bits = Annotated[str | None, typer.Option(help="2, 3, 4, 8 or auto; 4 if nothing says otherwise.")]
_GroupSize = Annotated[
    int | None,
    typer.Option(help="Columns that share a scale; -1 is one scale a row. Of a MODEL: 128, 64 or 32, what fits."),
]
_Output = Annotated[Path | None, typer.Option(help="Run directory. Of a MODEL: runs/NAME-w4g128 and the like.")]
_Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: a .parquet, .jsonl, .jsonl.gz or .txt file, or a dataset on the Hub; python-docs, "
        "which Python ships, if nothing says otherwise."
    ),
]
_Mode = Annotated[
    str | None,
    typer.Option(
        help="blocks, all blocks in parallel; stages, in parallel too, better and slower; or sequential, mostly the "
        "best, which more than a few workers hardly speed up. It is blocks if nothing says otherwise."
    ),
]
_Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key of the configuration, such as calibration.samples=32; `astro-dist config` lists them. "
        "Repeatable.",
        metavar="KEY=VALUE",
    ),
]


def takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that describe a run, in place of its first parameter, the configuration.

    Args:
        command: Function whose first parameter is a configuration.
    """

    @functools.wraps(command)
    def parsed(target: str, assignments: list[str] | None, **options: Any) -> None:
        say_begin(target)
        with waiting_for("reading the configuration"):
            from astro_dist.planning.settings import MAIN_KEYS, run_config

            main_keys = {name: options.pop(name) for name in MAIN_KEYS}
            config = run_config(target, assignments or (), **main_keys)
        command(config, **options)

    shared = {"target": _Target, "bits": _Bits, "group_size": _GroupSize, "output": _Output}
    shared |= {"calibration": _Calibration, "mode": _Mode, "assignments": _Assignments}
    signature = inspect.signature(command)
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = [
        inspect.Parameter(name, keyword, default=inspect.Parameter.empty if name == "target" else None, annotation=kind)
        for name, kind in shared.items()
    ]
    others = [parameter.replace(kind=keyword) for parameter in list(signature.parameters.values())[1:]]
    parsed.__signature__ = signature.replace(parameters=[*first, *others])  # type: ignore[attr-defined]
    parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in (*first, *others)}
    return parsed
