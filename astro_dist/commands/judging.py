"""The commands that judge models: perplexity and tasks, runs beside each other, a prompt continued."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from astro.errors import ConfigError
from astro_dist.commands.output import (
    AsJson,
    Device,
    Dtype,
    Trust,
    begin_with,
    ignore,
    print_json,
    require_runs,
    say_lines,
    stream,
)
from astro_dist.console import waiting_for

if TYPE_CHECKING:
    from astro_dist.evaluation.judge import Pool

__all__ = ["compare", "evaluate", "try_prompt"]

_HiddenGb = Annotated[float, typer.Option("--hidden-gb", help="Memory of each worker for hidden states, in GB.")]


def evaluate(  # noqa: PLR0913 - every option is a parameter
    model: Annotated[
        str,
        typer.Argument(help="Run directory, folder of a model, or ORG/NAME\\[@REVISION] on the Hub.", metavar="MODEL"),
    ],
    text: Annotated[
        str | None,
        typer.Option(help="Perplexity on this .parquet, .jsonl or .txt file, dataset, or python-docs."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text, or key of its objects.")] = "text",
    subset: Annotated[str | None, typer.Option(help="Subset of a dataset on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset on the Hub.")] = "test",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset; main if not given.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    bos: Annotated[
        bool,
        typer.Option("--bos", help="The tokenizer's first tokens lead every window, as Gemma wants; else the text."),
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness: arc_easy,mmlu:5, or `paper` for Astro's table.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with more tasks; code that they name runs.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Windows of the text, and questions of a task.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare predictions on the text with this model's.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Workers that share a text: a number, or auto for all that Ray has room for."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    hidden_gb: _HiddenGb = 4.0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Judge a model by its perplexity on a text and by tasks, with one block of it in memory at a time."""
    begin_with(model, against)
    with waiting_for("loading the libraries"):
        from astro_dist.config.schema import TextSource
        from astro_dist.evaluation.judge import JudgeRequest, judge
        from astro_dist.evaluation.judge_settings import JudgeSettings
        from astro_dist.evaluation.words import judgement_lines, task_table

    settings = JudgeSettings(device=device, dtype=dtype, hidden_gb=hidden_gb, trust_remote_code=trust)
    source = None
    if text is not None:
        source = TextSource(source=text, column=column, subset=subset, split=split, revision=revision, share=1.0)
    request = JudgeRequest(
        text=source, window=window, leads_each=bos, tasks=tasks, include=include, limit=limit, against=against
    )
    with _pool(workers, device) as pool:
        judgement = judge(model, request, settings, pool)
    if as_json:
        print_json(judgement.to_json())
        return
    say_lines(*judgement_lines(judgement))
    if judgement.tasks:
        Console().print(task_table(judgement))


def _pool(workers: str | None, device: str) -> "AbstractContextManager[Pool | None]":
    """Return the workers that measure a text; None stands for this process."""
    if workers is None:
        return nullcontext()
    if workers != "auto" and not (workers.isdigit() and int(workers)):
        raise ConfigError(f"--workers {workers}: expected auto or at least 1")
    from astro_dist.execution.measuring_pool import MeasuringPool

    return MeasuringPool("auto" if workers == "auto" else int(workers), device)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of finished runs.", metavar="RUN")],
    html: Annotated[Path | None, typer.Option(help="Also write a page with a chart of each figure.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show finished runs beside each other: bits, size, what they lost, time, worst layer, fallbacks."""
    require_runs(*runs)
    from astro_dist.evaluation.comparison import compare_runs
    from astro_dist.report.comparison_words import comparison_tables

    comparison = compare_runs(runs)
    if html is not None:
        from astro_dist.report.comparison_page import write_comparison  # it loads what all pages draw with

        write_comparison(comparison, html)
    if as_json:
        print_json(comparison.to_json())
        return
    console = Console()
    for table in comparison_tables(comparison, console.width):
        console.print(table)
    say_lines(*(f"note: {note}" for note in comparison.notes), *([f"written: {html}"] if html is not None else []))


def try_prompt(  # noqa: PLR0913 - every option is a parameter
    model: Annotated[
        str, typer.Argument(help="Run directory of a finished run; another model needs --against.", metavar="MODEL")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.", metavar="PROMPT")],
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 60,
    against: Annotated[str | None, typer.Option(help="The original; without it the source of the run.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message in the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Let the original and the quantized model continue a prompt, each token the most likely one."""
    begin_with(model, against)
    with waiting_for("loading the libraries"):
        from astro_dist.evaluation.beside import TryRequest, continue_beside
        from astro_dist.evaluation.judge_settings import JudgeSettings
        from astro_dist.evaluation.words import beside_line

    settings = JudgeSettings(device=device, dtype=dtype, trust_remote_code=trust)
    request = TryRequest(prompt=prompt, num_tokens=tokens, against=against, chat=chat)
    show, title = (ignore, ignore) if as_json else (stream, say_lines)
    beside = continue_beside(model, request, settings, show, title)
    if as_json:
        print_json(beside.to_json())
    else:
        say_lines(beside_line(beside))
