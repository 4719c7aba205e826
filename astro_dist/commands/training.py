"""The command that trains a model whose activations can be quantized."""

from pathlib import Path
from typing import Annotated

import typer

from astro_dist.commands.output import AsJson, print_json, say_begin, say_lines
from astro_dist.console import waiting_for

__all__ = ["train"]

_Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key, such as optimization.steps=1000; `astro-dist config --train` lists them. Repeatable.",
        metavar="KEY=VALUE",
    ),
]


def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the training.", metavar="CONFIG")],
    assignments: _Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Train a model without outlier channels in its activations, or go on from the last checkpoint."""
    say_begin(str(config))
    from astro_dist.config.yaml_file import load_train_config

    settings = load_train_config(config, assignments)
    from astro_dist.source.whole_text import require_place

    require_place(settings.text.text_source, "text.source")
    with waiting_for("loading the libraries"):  # torch among them, for which a wrong file need not wait
        from astro_dist.training.train import train as do_training

    summary = do_training(settings)
    if as_json:
        print_json(summary.to_json())
    else:
        say_lines(*summary.lines())
