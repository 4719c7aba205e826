"""Run the commands. Exit code 0 means done, 1 that the run failed, 2 that the input was wrong and nothing was started.

Each command parses its options, calls one function and prints what that returns. Most functions import torch, which
takes seconds that `--help` need not wait for; so each command imports what it calls.
"""

import dataclasses
import io
import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import astro
from astro.errors import AstroError, InputError
from astro_dist.console import show_log
from astro_dist.execution.termination import EXIT_CODE, MESSAGE, Terminated, Termination

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
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(astro.__version__)
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and end.")]

_FAILED, _WRONG_INPUT, _INTERRUPTED = 1, 2, 130
_shows_tracebacks = False


@app.callback()
def _options(debug: _Debug = False, version: _Version = False) -> None:
    global _shows_tracebacks
    _shows_tracebacks = debug


@app.command()
def quantize(config: _ConfigPath, assignments: _Assignments = None, as_json: _Json = False) -> None:
    """Validate, plan, run, assemble, and publish where the configuration says so.

    Goes on where it was when the run directory holds this very run.
    """
    from astro_dist.config.yaml_file import load_config

    settings = load_config(config, assignments)
    from astro_dist import pipeline  # a wrong key need not wait for torch either
    from astro_dist.report.command_output import summary_lines

    summary = pipeline.quantize(settings)
    if as_json:
        _print_json(summary.to_json())
    else:
        _say(*summary_lines(summary, settings))


@app.command()
def plan(
    config: _ConfigPath,
    assignments: _Assignments = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers to plan for; as configured, or 1.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu (this machine, measured), or a GPU: h100, a100, ...", show_default="cpu")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Tell what a run will need, from the headers alone: units, bytes, memory, disk, time.

    Reads no weight and begins no run. Refuses what `quantize` would refuse, the calibration text too where it is on
    this machine. Blocks of one size that follow each other share a row.
    """
    from astro_dist.config.yaml_file import load_config

    settings = load_config(config, assignments)
    from astro_dist.planning.validate import forecast, prepare, require_text
    from astro_dist.report.command_output import forecast_lines, plan_table, served_line, settings_line

    prepared = prepare(settings)
    require_text(prepared)
    needed = forecast(prepared, workers, device)
    if as_json:
        content = {"needed": dataclasses.asdict(needed), "notes": list(prepared.notes)}
        content["tensor_parallel"] = dataclasses.asdict(prepared.tensor_parallel)
        _print_json({**prepared.plan.summary(), **content})
        return
    _say(settings_line(settings))
    Console().print(plan_table(prepared.plan))
    _say(
        *forecast_lines(prepared.plan, needed),
        served_line(prepared.tensor_parallel),
        *(f"note: {note}" for note in prepared.notes),
    )


@app.command()
def submit(
    config: _ConfigPath,
    address: Annotated[str, typer.Option(help="Address of the job server, e.g. http://127.0.0.1:8265.")],
    assignments: _Assignments = None,
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and end with its exit code.")] = True,
) -> None:
    """Run `quantize` as a job of a Ray cluster. Submitted again after a failure, it goes on where it was."""
    from astro_dist.config.yaml_file import load_config
    from astro_dist.execution.ray_job import submit as submit_job

    code = submit_job(load_config(config, assignments), address, _say, follow)
    if code:
        raise typer.Exit(code)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Run directory (output.dir).")],
    as_json: _Json = False,
) -> None:
    """Tell what of a run is done, in flight and left; retries, fallbacks, time left."""
    from astro_dist.report.command_output import status_lines
    from astro_dist.report.status import read_status

    now = read_status(run)
    if as_json:
        _print_json(now.to_json())
    else:
        _say(*status_lines(now))


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Run directory (output.dir) of a finished run.")],
    repo: Annotated[str, typer.Option(help="ORG/NAME of the repository on the Hub.", metavar="ORG/NAME")],
    revision: Annotated[str | None, typer.Option(help="Branch instead of main.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository can be seen by everyone.")] = False,
    as_json: _Json = False,
) -> None:
    """Upload a finished run to the Hub, or go on with that. Sends what is missing and makes one commit."""
    from astro_dist.config.yaml_file import make_target
    from astro_dist.publish.publication import publish_run
    from astro_dist.report.command_output import publication_line

    published = publish_run(run, make_target(repo, not public, revision, pull_request))
    if as_json:
        _print_json(published.to_json())
    else:
        _say(publication_line(published))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory (output.dir).")]) -> None:
    """Write one HTML page and one parquet table of a run's layers, retries and fallbacks into its directory."""
    from astro_dist.report.html import write_report

    _say(f"written: {write_report(run)}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder of a quantized model, or ORG/NAME\\[@REVISION] on the Hub.")],
    against: Annotated[str | None, typer.Option(help="The source it was made from: also each layer's error.")] = None,
    as_json: _Json = False,
) -> None:
    """Read a written model again: every tensor is there, shapes fit, scales are finite, index and config agree."""
    from astro_dist.export.verify import verify_model
    from astro_dist.report.command_output import verification_lines

    verification = verify_model(model, against)
    if as_json:
        _print_json(verification.to_json())
    else:
        _say(*verification_lines(verification, against))


def main() -> None:
    """Run a command and turn its errors into one readable paragraph and an exit code."""
    _print_whatever_the_encoding()
    show_log()
    termination = Termination()
    try:
        with termination.handled():
            code = _run_command(termination)
    except Terminated:  # wherever it came, also while another error was explained
        code = EXIT_CODE
    if code == EXIT_CODE:
        typer.echo(MESSAGE, err=True)
    sys.exit(code)


def _run_command(termination: Termination) -> int:
    """Run the command that this process was started with, say what went wrong, and return the exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except Exception as error:
        code = EXIT_CODE if termination.has_come else _code_of(error)
    if code == _INTERRUPTED:
        typer.echo("interrupted; what is finished is kept, run the same command to go on", err=True)
    return int(code)


def _code_of(error: BaseException) -> int:
    """Return the exit code of an error, after it was explained."""
    show = getattr(error, "show", None)
    if isinstance(error, typer.Abort):
        return _INTERRUPTED
    if isinstance(error, AstroError):
        _explain(str(error))
        return _WRONG_INPUT if isinstance(error, InputError) else _FAILED
    if show is not None:  # a usage error, whose class lives elsewhere in every version of typer
        show()
        return _WRONG_INPUT
    # A defect of ours or of a library: still one paragraph.
    _explain(f"{type(error).__name__}: {error}. This is unexpected; what is finished is kept. See --debug")
    return _FAILED


def _print_whatever_the_encoding() -> None:
    """Write characters that the terminal's encoding lacks as escapes: a run that is done must not end in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _explain(message: str) -> None:
    if _shows_tracebacks:
        traceback.print_exc()
    # Libraries explain themselves over many lines; here it is one paragraph.
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def _say(*lines: str) -> None:
    for line in lines:
        # Names of files and layers may hold what rich takes for markup.
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))
