"""Run the commands.

Exit code 0 means done, 1 that the run failed, 2 that the input was wrong and nothing was started.
"""

import inspect
import io
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated

import typer

import astro
from astro.errors import AstroError, InputError
from astro_dist.commands.configuration import env, explain_config, init
from astro_dist.commands.inspecting import inspect as inspect_model
from astro_dist.commands.judging import compare, evaluate, try_prompt
from astro_dist.commands.result import publish, report, status, verify
from astro_dist.commands.run import plan, quantize, submit
from astro_dist.commands.training import train
from astro_dist.console import show_log
from astro_dist.execution.termination import EXIT_CODE, KEPT, MESSAGE, Terminated, Termination

__all__ = ["app", "main"]

_EXAMPLES = """
Examples:

  astro-dist quantize Qwen/Qwen3-8B --bits 4 --calibration texts.parquet
  astro-dist plan my-run.yaml --workers 8 --device h100
  astro-dist init ./my-model

Documentation: README.md and configs/README.md of the repository; `astro-dist config` explains every key.
"""


def _as_paragraphs(lines: Iterable[str]) -> str:
    """Return text that keeps its lines, of which versions of typer keep all or join those of a paragraph."""
    return "\n\n".join(line for line in lines if line)


def _help_of(command: Callable[..., None]) -> str:
    """Return a docstring whose paragraphs have no line breaks, so that they are wrapped at the terminal's width."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return _as_paragraphs(paragraph.replace("\n", " ") for paragraph in paragraphs)


app = typer.Typer(
    help="Quantize large language models on a Ray cluster: Astro + GPTQ, block by block.",
    epilog=_as_paragraphs(_EXAMPLES.splitlines()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "plan": plan,
    "submit": submit,
    "init": init,
    "config": explain_config,
    "env": env,
    "status": status,
    "publish": publish,
    "report": report,
    "verify": verify,
    "evaluate": evaluate,
    "inspect": inspect_model,
    "train": train,
    "compare": compare,
    "try": try_prompt,
}
"""The commands by name, in the order of `--help`."""
for _name, _command in _COMMANDS.items():
    app.command(_name, help=_help_of(_command))(_command)

_FAILED, _WRONG_INPUT, _INTERRUPTED = 1, 2, 130

_GO_ON = {"quantize", "submit", "train", "publish"}
"""The commands that keep what is finished when they are stopped, and go on with it."""

_shows_tracebacks = False


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(astro.__version__)
        raise typer.Exit


_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and end.")]


@app.callback()
def _options(context: typer.Context, debug: _Debug = False, version: _Version = False) -> None:
    global _shows_tracebacks
    _shows_tracebacks = debug
    if isinstance(context.obj, Termination):  # it is not where the app is called by another program
        context.obj.keeps_work = context.invoked_subcommand in _GO_ON


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
        typer.echo(f"{MESSAGE}{termination.advice}", err=True)
    sys.exit(code)


def _run_command(termination: Termination) -> int:
    """Run the command that this process was started with, say what went wrong, and return the exit code."""
    try:
        code = app(standalone_mode=False, obj=termination) or 0
    except Exception as error:
        code = EXIT_CODE if termination.has_come else _code_of(error, bool(termination.keeps_work))
    if code == _INTERRUPTED:
        typer.echo(f"interrupted{termination.advice}", err=True)
    return int(code)


def _code_of(error: BaseException, keeps_work: bool) -> int:
    """Return the exit code of an error, after it was explained; the command keeps what is finished, or not."""
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
    _explain(f"{type(error).__name__}: {error}. This is unexpected{KEPT if keeps_work else ''}. See --debug")
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
