"""Run the commands. Exit code 0 means done, 1 that the run failed, 2 that the input was wrong and nothing was started.

Each command parses its options, calls one function and prints what that returns. Most functions import torch, which
takes seconds that `--help` need not wait for; so each command imports what it calls.
"""

import functools
import inspect
import io
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

import astro
from astro.errors import AstroError, ConfigError, InputError
from astro_dist.console import show_log
from astro_dist.execution.termination import EXIT_CODE, MESSAGE, Terminated, Termination

if TYPE_CHECKING:
    from astro_dist.config.schema import RunConfig

__all__ = ["app", "main"]

_EXAMPLES = """
Examples:

  astro-dist quantize meta-llama/Llama-3.1-8B --bits 4 --calibration texts.parquet
  astro-dist plan my-run.yaml --workers 8 --device h100
  astro-dist init ./my-model

Documentation: README.md and configs/README.md of the repository; `astro-dist config` explains every key.
"""

app = typer.Typer(
    help="Quantize large language models on a Ray cluster: Astro + GPTQ, block by block.",
    epilog=_EXAMPLES.strip().replace("\n", "\n\n"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
_Calibration = Annotated[str | None, typer.Option(help="Text to calibrate on.")]
_Mode = Annotated[str | None, typer.Option(help="blocks, all blocks in parallel; or sequential.")]
_Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value: section.key=value. Repeatable.", metavar="KEY=VALUE"),
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
_Dtype = Annotated[str, typer.Option(help="Dtype of forward passes; auto for the model's own.")]
_HiddenGb = Annotated[float, typer.Option("--hidden-gb", help="Memory for hidden states between blocks, in GB.")]
_Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Code that the model ships may run.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(astro.__version__)
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and end.")]

_FAILED, _WRONG_INPUT, _INTERRUPTED = 1, 2, 130
_WATCH_S = 2.0
"""Seconds between two looks at a run."""

_shows_tracebacks = False


@app.callback()
def _options(debug: _Debug = False, version: _Version = False) -> None:
    global _shows_tracebacks
    _shows_tracebacks = debug


def _takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that describe a run, in place of its first parameter, the configuration."""

    @functools.wraps(command)
    def parsed(target: str, assignments: list[str] | None, **options: Any) -> None:
        from astro_dist.planning.settings import MAIN_KEYS, run_config

        main_keys = {name: options.pop(name) for name in MAIN_KEYS}
        command(run_config(target, assignments or (), **main_keys), **options)

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


@app.command()
@_takes_run
def quantize(settings: "RunConfig", as_json: _Json = False) -> None:
    """Validate, plan, run, assemble, and publish where the configuration says so.

    Goes on where it was when the run directory holds this very run.
    """
    from astro_dist import pipeline
    from astro_dist.report.command_output import summary_lines

    summary = pipeline.quantize(settings)
    if as_json:
        _print_json(summary.to_json())
    else:
        _say(*summary_lines(summary, settings))


@app.command()
@_takes_run
def plan(
    settings: "RunConfig",
    workers: Annotated[int | None, typer.Option(min=1, help="Workers to plan for; as configured, or 1.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu (this machine, measured), or a GPU: h100, a100, ...", show_default="cpu")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the units of the run too.")] = False,
    as_json: _Json = False,
) -> None:
    """Tell what a run will need, from the headers alone: bytes, memory, disk, time.

    Reads no weight and begins no run. Refuses what `quantize` would refuse; a note says where the calibration text
    is not on this machine.
    """
    from astro_dist.planning.forecast import plan as foretell
    from astro_dist.report.plan_card import plan_card, plan_table

    forecast = foretell(settings, workers, device)
    if as_json:
        _print_json(forecast.to_json())
        return
    if verbose:
        Console().print(plan_table(forecast.prepared.plan))
    _say(*plan_card(forecast))


@app.command()
@_takes_run
def submit(
    settings: "RunConfig",
    address: Annotated[str, typer.Option(help="Address of the job server, e.g. http://127.0.0.1:8265.")],
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and end with its exit code.")] = True,
) -> None:
    """Run `quantize` as a job of a Ray cluster. Submitted again after a failure, it goes on where it was."""
    from astro_dist.execution.ray_job import submit as submit_job

    code = submit_job(settings, address, _say, follow)
    if code:
        raise typer.Exit(code)


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Model: a folder, ORG/NAME on the Hub, or a URL.")],
    file: Annotated[Path | None, typer.Argument(help="YAML file to write; NAME.yaml if none is given.")] = None,
) -> None:
    """Write a YAML file for a model, with a comment at each key and a group size that fits the model."""
    from astro_dist.config.explanation import starting_yaml
    from astro_dist.planning.settings import run_config

    settings = run_config(model)
    path = file or Path(f"{settings.output.dir.name}.yaml")
    if path.exists():
        raise ConfigError(f"{path}: is there already; name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    path.write_text(starting_yaml(settings), encoding="utf-8")
    _say(f"written: {path}", "Next:", f"  astro-dist plan {path}", f"  astro-dist quantize {path}")


@app.command(name="config")
def explain_config(
    key: Annotated[str | None, typer.Argument(help="A key, e.g. quantization.bits, or a section.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a YAML file.")] = False,
) -> None:
    """Explain a key of the YAML file; without a key, print all of them with their defaults."""
    from astro_dist.config.explanation import commented_defaults, explain, json_schema

    if schema:
        _print_json(json_schema())
    else:
        typer.echo(explain(key) if key else commented_defaults())


@app.command()
def env(as_json: _Json = False) -> None:
    """Show what is installed and which devices there are, for a bug report."""
    from astro_dist.report.environment import read_environment

    environment = read_environment()
    if as_json:
        _print_json(environment)
    else:
        _say(*(f"{name}: {value}" for name, value in environment.items()))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="Run directory (output.dir), or the model in it.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until the run ends.")] = False,
    as_json: _Json = False,
) -> None:
    """Tell what of a run is done, in flight and left; retries, fallbacks, time left."""
    from astro_dist.report.command_output import status_lines
    from astro_dist.report.run_lines import finished_lines
    from astro_dist.report.status import read_status
    from astro_dist.run_directory.layout import RunLayout

    root = RunLayout.around(run).root
    if watch and not as_json:
        with Live(console=Console(), auto_refresh=False) as live:
            while (now := read_status(root)).state == "running":
                live.update(Text("\n".join(status_lines(now))), refresh=True)
                time.sleep(_WATCH_S)
            live.update(Text(""), refresh=True)
    now = read_status(root)
    if as_json:
        _print_json(now.to_json())
    else:
        _say(*status_lines(now), *finished_lines(now, root))


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
    from astro_dist.run_directory.layout import RunLayout

    published = publish_run(RunLayout.around(run).root, make_target(repo, not public, revision, pull_request))
    if as_json:
        _print_json(published.to_json())
    else:
        _say(publication_line(published))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run directory (output.dir).")]) -> None:
    """Write one HTML page and one parquet table of a run's layers, retries and fallbacks into its directory."""
    from astro_dist.report.findings import Findings
    from astro_dist.report.html import write_report
    from astro_dist.report.run_lines import report_lines
    from astro_dist.run_directory.layout import RunLayout

    findings = Findings.read(RunLayout.around(run).root)
    _say(f"written: {write_report(findings)}", *report_lines(findings))


@app.command()
def verify(
    model: Annotated[
        str, typer.Argument(help="Folder of a quantized model or of its run, or ORG/NAME\\[@REVISION] on the Hub.")
    ],
    against: Annotated[str | None, typer.Option(help="The source it was made from: also each layer's error.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer's error, not the ten largest.")] = False,
    trust: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Read a written model again: every tensor is there, shapes fit, scales are finite, index and config agree."""
    from astro_dist.export.verify import verify_model
    from astro_dist.report.command_output import verification_lines

    verification = verify_model(model, against, trust)
    if as_json:
        _print_json(verification.to_json())
    else:
        _say(*verification_lines(verification, against, show_all))


@app.command()
def evaluate(  # noqa: PLR0913 - every option is a parameter
    model: Annotated[
        str, typer.Argument(help="Run directory, folder of a model, or ORG/NAME\\[@REVISION] on the Hub.")
    ],
    text: Annotated[
        str | None, typer.Option(help="Perplexity on this .parquet, .jsonl or .txt file, or dataset on the Hub.")
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
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    hidden_gb: _HiddenGb = 4.0,
    trust: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Judge a model by its perplexity on a text and by tasks, with one block of it in memory at a time."""
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
    judgement = judge(model, request, settings)
    if as_json:
        _print_json(judgement.to_json())
        return
    _say(*judgement_lines(judgement))
    if judgement.tasks:
        Console().print(task_table(judgement))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of finished runs.", metavar="RUN...")],
    as_json: _Json = False,
) -> None:
    """Show finished runs beside each other: bits, size, what they lost, time, worst layer, fallbacks."""
    from astro_dist.evaluation.comparison import compare_runs
    from astro_dist.evaluation.words import comparison_table

    comparison = compare_runs(runs)
    if as_json:
        _print_json(comparison.to_json())
        return
    Console().print(comparison_table(comparison))
    _say(*(f"note: {note}" for note in comparison.notes))


@app.command("try")
def try_prompt(  # noqa: PLR0913 - every option is a parameter
    model: Annotated[str, typer.Argument(help="Run directory of a finished run; another model needs --against.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 60,
    against: Annotated[str | None, typer.Option(help="The original; without it the source of the run.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message in the model's chat template.")] = False,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
    trust: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Let the original and the quantized model continue a prompt, each token the most likely one."""
    from astro_dist.evaluation.beside import TryRequest, continue_beside
    from astro_dist.evaluation.judge_settings import JudgeSettings
    from astro_dist.evaluation.words import beside_line

    settings = JudgeSettings(device=device, dtype=dtype, trust_remote_code=trust)
    request = TryRequest(prompt=prompt, num_tokens=tokens, against=against, chat=chat)
    show, title = (_ignore, _ignore) if as_json else (_stream, _say)
    beside = continue_beside(model, request, settings, show, title)
    if as_json:
        _print_json(beside.to_json())
    else:
        _say(beside_line(beside))


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
    console = Console()
    for line in lines:
        # Names of files and layers may hold what rich takes for markup. A command is to be copied as it is, and so is
        # all that no person looks at.
        is_verbatim = line.startswith("  ") or not console.is_terminal
        console.print(line, markup=False, highlight=False, soft_wrap=is_verbatim)


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    """Show nothing of a text that --json will hold."""


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))
