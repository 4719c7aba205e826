"""The command that shows what makes a model hard to quantize."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from astro_dist.commands.output import AsJson, Device, Dtype, Trust, begin_with, print_json, say_lines
from astro_dist.config.text_place import PYTHON_DOCS
from astro_dist.console import waiting_for

__all__ = ["inspect"]


def inspect(  # noqa: PLR0913 - every option is a parameter
    model: Annotated[
        str,
        typer.Argument(
            help="Run directory, folder of a model, ORG/NAME\\[@REVISION] on the Hub, or a URL.", metavar="MODEL"
        ),
    ],
    against: Annotated[str | None, typer.Option(help="Show this model too, as the state before.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with a chart of all layers.")] = None,
    text: Annotated[
        str,
        typer.Option(help="This .parquet, .jsonl or .txt file, dataset, or python-docs passes through the model."),
    ] = PYTHON_DOCS,
    column: Annotated[str, typer.Option(help="Column of the text, or key of its objects.")] = "text",
    subset: Annotated[str | None, typer.Option(help="Subset of a dataset on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "train",
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    limit: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's outlier channels, kurtosis and largest weights, with one block of it in memory at a time."""
    begin_with(model, against)
    with waiting_for("loading the libraries"):
        from astro_dist.config.schema import TextSource
        from astro_dist.evaluation.inspection import InspectRequest, inspect_model
        from astro_dist.evaluation.judge_settings import JudgeSettings
        from astro_dist.report.inspection_words import inspection_lines, inspection_table

    settings = JudgeSettings(device=device, dtype=dtype, trust_remote_code=trust)
    source = TextSource(source=text, column=column, subset=subset, split=split, share=1.0)
    inspection = inspect_model(
        model, InspectRequest(text=source, window=window, limit=limit, against=against), settings
    )
    if html is not None:
        from astro_dist.report.inspection_page import write_page  # it loads what all pages draw with

        write_page(inspection, html)
    if as_json:
        print_json(inspection.to_json())
        return
    Console().print(inspection_table(inspection))
    say_lines(*inspection_lines(inspection), *([f"written: {html}"] if html is not None else []))
