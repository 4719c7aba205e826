"""The commands that help to write a configuration, and that show what is installed."""

from pathlib import Path
from typing import Annotated

import typer

from astro.errors import ConfigError
from astro_dist.commands.output import AsJson, print_json, say_begin, say_lines

__all__ = ["env", "explain_config", "init"]


def init(
    model: Annotated[str, typer.Argument(help="Model: a folder, ORG/NAME on the Hub, or a URL.", metavar="MODEL")],
    file: Annotated[
        Path | None, typer.Argument(help="YAML file to write; NAME.yaml if none is given.", metavar="FILE")
    ] = None,
) -> None:
    """Write a YAML file for a model, with a comment at each key and a group size that fits the model."""
    say_begin(model)
    from astro_dist.config.explanation import starting_yaml
    from astro_dist.planning.settings import run_config

    settings = run_config(model)
    path = file or Path(f"{settings.output.dir.name}.yaml")
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    path.write_text(starting_yaml(settings), encoding="utf-8")
    say_lines(f"written: {path}", "Next:", f"  astro-dist plan {path}", f"  astro-dist quantize {path}")


def explain_config(
    key: Annotated[
        str | None, typer.Argument(help="A key, e.g. quantization.bits, or a section.", metavar="KEY")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a YAML file.")] = False,
    training: Annotated[bool, typer.Option("--train", help="Keys of a file for `train`, not for `quantize`.")] = False,
    explained: Annotated[str | None, typer.Option("--explain", hidden=True, help="The same as KEY.")] = None,
) -> None:
    """Explain a key of the YAML file; without a key, print all of them with their defaults."""
    from astro_dist.config.explanation import commented_defaults, explain, json_schema
    from astro_dist.config.schema import RunConfig
    from astro_dist.config.training import TrainConfig

    kind, key = TrainConfig if training else RunConfig, key or explained
    if schema:
        print_json(json_schema(kind))
    else:
        typer.echo(explain(key, kind) if key else commented_defaults(kind))


def env(as_json: AsJson = False) -> None:
    """Show what is installed and which devices there are, for a bug report."""
    from astro_dist.report.environment import read_environment

    environment = read_environment()
    if as_json:
        print_json(environment)
    else:
        say_lines(*(f"{name}: {value}" for name, value in environment.items()))
