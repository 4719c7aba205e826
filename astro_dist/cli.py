"""The command line. Exit code 0 done, 1 the run failed, 2 the input was wrong and nothing was started."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from astro.errors import AstroError, InputError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Quantize large language models on a Ray cluster: Astro + GPTQ, block by block.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_ConfigPath = Annotated[Path, typer.Argument(help="YAML file that describes the whole run.", metavar="CONFIG")]
_Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: section.key=value. Repeatable.", metavar="KEY=VALUE"),
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="ASTRO_DEBUG")]


@app.callback()
def _options(debug: _Debug = False) -> None:
    if debug:
        os.environ["ASTRO_DEBUG"] = "1"


@app.command()
def quantize(config: _ConfigPath, assignments: _Assignments = None, as_json: _Json = False) -> None:
    """Validate, plan, run and assemble. Goes on where it was when the run directory holds this very run."""
    from astro_dist import pipeline  # imports torch: seconds that `--help` need not wait for
    from astro_dist.config import load_config

    settings = load_config(config, assignments)
    summary = pipeline.quantize(settings)
    if as_json:
        _print_json(summary)
        return
    console = Console()
    perplexity = summary["perplexity"]
    if perplexity["original"] is not None:
        console.print(
            f"Hold-out perplexity {perplexity['original']:.3f} → {perplexity['quantized']:.3f} "
            f"({settings.calibration.source})",
            highlight=False,
        )
    size = summary["bytes_written"] / summary["bytes_read"]
    console.print(f"{summary['bytes_written'] / 1e6:.0f} MB written, {size:.0%} of the source", highlight=False)
    for layer in summary["fallbacks"]["damping_raised"]:
        console.print(f"fallback: the damping of {layer} had to be raised", highlight=False)
    for note in summary["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(f"Done in {summary['wall_s']:.0f} s: {summary['model']}", highlight=False, soft_wrap=True)


@app.command()
def plan(config: _ConfigPath, assignments: _Assignments = None, as_json: _Json = False) -> None:
    """Units and bytes of a run, from the headers alone: no weight is read, nothing is written."""
    from astro_dist import pipeline
    from astro_dist.config import load_config

    prepared = pipeline.prepare(load_config(config, assignments))
    found = prepared.plan
    content = {
        "blocks": [
            {"unit": unit.name, "linears": len(unit.linears), "read_bytes": unit.read_bytes,
             "written_bytes": unit.written_bytes, "file": unit.file}
            for unit in found.blocks
        ],
        "copies": [{"unit": unit.name, "read_bytes": unit.read_bytes, "file": unit.file} for unit in found.copies],
        "quantized_weights": found.weights,
        "ignored": list(found.ignore),
        "read_bytes": found.read_bytes,
        "written_bytes": found.written_bytes,
        "notes": list(prepared.notes),
    }  # fmt: skip
    if as_json:
        _print_json(content)
        return
    table = Table("unit", "linear layers", "read MB", "written MB", "file")
    for unit in found.copies:
        table.add_row(unit.name, "-", f"{unit.read_bytes / 1e6:.1f}", f"{unit.read_bytes / 1e6:.1f}", unit.file)
    for block in found.blocks:
        sizes = (f"{block.read_bytes / 1e6:.1f}", f"{block.written_bytes / 1e6:.1f}")
        table.add_row(block.name, str(len(block.linears)), *sizes, block.file)
    console = Console()
    console.print(table)
    console.print(
        f"{found.weights / 1e6:.1f} million weights quantized; "
        f"{found.read_bytes / 1e6:.1f} MB read, {found.written_bytes / 1e6:.1f} MB written",
        highlight=False,
    )
    for note in prepared.notes:
        console.print(f"note: {note}", highlight=False)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="Folder of a quantized model.")],
    against: Annotated[Path | None, typer.Option(help="Folder of the source: also the error of each layer.")] = None,
    as_json: _Json = False,
) -> None:
    """Re-read what was written: every tensor present, shapes, finite scales, index and config agree."""
    from astro_dist.verify import verify_model

    report = verify_model(model, against)
    if as_json:
        _print_json(report)
        return
    console = Console()
    for name, error in report["relative_weight_errors"].items():
        console.print(f"{name}: {error:.5f}", highlight=False)
    console.print(f"{report['linears']} packed layers and {report['tensors']} tensors are sound", highlight=False)


def main() -> None:
    """Entry point: errors become one readable paragraph and an exit code."""
    try:
        app(standalone_mode=False)
    except AstroError as error:
        if os.environ.get("ASTRO_DEBUG"):
            raise
        # Libraries explain themselves over many lines; here it is one paragraph.
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except typer.Abort:
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted; what is finished is kept, run the same command to go on", err=True)
        sys.exit(130)
    except Exception as error:
        # click's own usage errors know how to show themselves.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))
