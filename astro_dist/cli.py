"""The command line. Exit code 0 done, 1 the run failed, 2 the input was wrong and nothing was started."""

import dataclasses
import itertools
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

import astro
from astro.errors import AstroError, InputError
from astro_dist.console import in_words, show_log

if TYPE_CHECKING:  # they import torch: seconds that `--help` need not wait for
    from astro.quantization.layer_record import Fallbacks
    from astro_dist.config.schema import RunConfig
    from astro_dist.planning.units import BlockUnit

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
    from astro_dist import pipeline  # imports torch: seconds that neither `--help` nor a wrong key need wait for

    content = pipeline.quantize(settings)
    if as_json:
        _print_json(content)
        return
    from astro_dist.run_directory.summary import Summary

    summary = Summary.from_json(content)
    original, quantized = summary.perplexity.original, summary.perplexity.quantized
    if original is not None and quantized is not None:
        _say(f"Hold-out perplexity {original:.3f} → {quantized:.3f} ({settings.calibration.source})")
    share = summary.bytes_written / summary.bytes_read
    _say(f"{decimal(summary.bytes_written)} written, {share:.0%} of the source")
    _say_fallbacks(summary.fallbacks)
    for note in summary.notes:
        _say(f"note: {note}")
    _say(f"Done in {summary.wall_s:.0f} s: {summary.model}")
    if summary.publish is not None:
        _say(_published(summary.publish))
    else:
        root = settings.output.dir
        _say(
            f"Next: astro-dist verify {root}/model; astro-dist report {root}; astro-dist publish {root} --repo ORG/NAME"
        )


@app.command()
def plan(
    config: _ConfigPath,
    assignments: _Assignments = None,
    workers: Annotated[int | None, typer.Option(min=1, help="To plan for; as configured, or 1.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu (this machine, measured), or a GPU: h100, a100, ...", show_default="cpu")
    ] = None,
    as_json: _Json = False,
) -> None:
    """What a run will need, from the headers alone: units, bytes, memory, disk, time. No weight is read, no run begun.

    Refuses what `quantize` would refuse, the calibration text too where it is on this machine. Blocks of one size that
    follow each other share a row.
    """
    from astro_dist.config.yaml_file import load_config

    settings = load_config(config, assignments)
    from astro_dist.planning.validate import forecast, prepare, require_text

    prepared = prepare(settings)
    require_text(prepared)
    units, needed = prepared.plan, forecast(prepared, workers, device)
    if as_json:
        _print_json(
            {
                **units.summary(),
                "needed": dataclasses.asdict(needed),
                "notes": list(prepared.notes),
            }
        )
        return
    table = Table("unit", "layers each", "read each", "written each", "file")
    for unit in units.copies:
        table.add_row(unit.name, "-", decimal(unit.read_bytes), decimal(unit.read_bytes), unit.file)
    for (layers, read_bytes, written_bytes), equal in itertools.groupby(units.blocks, _size):
        blocks = list(equal)
        ends = blocks if len(blocks) == 1 else (blocks[0], blocks[-1])
        names, files = " to ".join(block.name for block in ends), " to ".join(block.file for block in ends)
        table.add_row(names, str(layers), decimal(read_bytes), decimal(written_bytes), files)
    _say(_main_settings(settings))
    Console().print(table)
    _say(
        f"{units.weights / 1e6:.1f} million weights quantized; "
        f"{decimal(units.read_bytes)} read, {decimal(units.written_bytes)} written"
    )
    _say(
        f"with {needed.workers} worker(s) on {needed.device}: about {in_words(needed.wall_s)}; "
        f"{needed.device_hours:.2f} device-hours, {needed.efficiency:.0%} of that at work; a worker needs "
        f"{decimal(int(needed.worker_bytes))} of memory, the run directory {decimal(int(needed.disk_bytes))} of disk; "
        f"workers read and write {decimal(int(needed.moved_bytes))}"
    )
    for note in prepared.notes:
        _say(f"note: {note}")


@app.command()
def submit(
    config: _ConfigPath,
    address: Annotated[str, typer.Option(help="Of the job server, e.g. http://127.0.0.1:8265.")],
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
    """What is done, in flight and left of a run; retries, fallbacks, time left."""
    from astro_dist.report.status import read_status

    now = read_status(run)
    if as_json:
        _print_json(now.to_json())
        return
    time_left = f", about {in_words(now.seconds_left)} left" if now.seconds_left is not None else ""
    up = "" if now.state == "complete" else f"; {now.workers} workers up"
    _say(
        f"{now.state}{', but damaged' if now.damaged else ''}: {now.blocks.done} of {now.blocks.total} blocks, "
        f"{now.units.done} of {now.units.total} units done{time_left}{up}"
    )
    if now.damaged:
        first, more = ", ".join(now.damaged[:3]), len(now.damaged) - 3
        _say(
            f"damaged: {first}{f' and {more} more' if more > 0 else ''} (gone, or of another size than was written, or "
            "a record that cannot be read); `quantize` of the same version makes them anew"
        )
    for doing in now.in_flight:
        _say(f"in flight: {doing.unit} on worker {doing.worker} for {doing.seconds} s")
    for retry in now.retries:
        _say(f"retried: {retry.unit}, {retry.method} on worker {retry.worker} ({retry.kind}): {retry.cause}")
    for mended in now.mended:
        _say(f"found damaged: {mended.unit}: {mended.reason}")
    for failure in now.upload_failures:
        _say(f"upload failed: {failure.cause}")
    for place in now.publish:
        made = f"published as commit {place.commit[:12]}" if place.commit else "not published yet"
        _say(f"{place.place}: holds {place.files} of {place.total} files, {made}")
    _say_fallbacks(now.fallbacks)


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

    entry = publish_run(run, make_target(repo, not public, revision, pull_request))
    if as_json:
        _print_json(entry)
    else:
        _say(_published(entry))


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
    """Re-read what was written: every tensor present, shapes, finite scales, index and config agree."""
    from astro_dist.export.verify import verify_model

    report = verify_model(model, against)
    if as_json:
        _print_json(report)
        return
    if errors := report["relative_weight_errors"]:
        _say(f"‖ŵ − w‖ / ‖w‖ of each layer, w of {against}; 0.1 to 0.2 is usual at 4 bits:")
        for name, error in errors.items():
            _say(f"{name}: {error:.5f}")
        _say(f"mean {sum(errors.values()) / len(errors):.5f}, largest {max(errors.values()):.5f}")
    compared = ", every file has the SHA-256 that it was written with" if report["checksums_compared"] else ""
    _say(f"{report['linears']} packed layers and {report['tensors']} tensors are sound{compared}")


def main() -> None:
    """Run a command: errors become one readable paragraph and an exit code."""
    show_log()
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = _INTERRUPTED
    except AstroError as error:
        _explain(str(error))
        code = _WRONG_INPUT if isinstance(error, InputError) else _FAILED
    except Exception as error:
        show = getattr(error, "show", None)
        if show is not None:  # a usage error, whose class lives elsewhere in every version of typer
            show()
            code = _WRONG_INPUT
        else:  # a defect of ours or of a library: still one paragraph
            _explain(f"{type(error).__name__}: {error}. This is unexpected; what is finished is kept. See --debug")
            code = _FAILED
    if code == _INTERRUPTED:
        typer.echo("interrupted; what is finished is kept, run the same command to go on", err=True)
    sys.exit(code or 0)


def _size(block: "BlockUnit") -> tuple[int, int, int]:
    return len(block.linears), block.read_bytes, block.written_bytes


def _main_settings(config: "RunConfig") -> str:
    q, calibration, execution = config.quantization, config.calibration, config.execution
    bits = f"{q.average_bits:g} bits on average" if q.bits == "auto" else f"{q.bits} bits"
    return (
        f"{config.model.source}: {bits}, group size {q.group_size}, format {q.format}; mode {execution.mode}, "
        f"{execution.rounds} round(s); calibration {calibration.samples} × {calibration.sequence_length} tokens"
    )


def _published(entry: Mapping[str, Any]) -> str:
    return f"Published: {entry['url']}, commit {entry['commit'][:12]}, {entry['files']} files"


def _explain(message: str) -> None:
    if _shows_tracebacks:
        traceback.print_exc()
    # Libraries explain themselves over many lines; here it is one paragraph.
    typer.echo(f"error: {' '.join(message.split())}", err=True)


def _say(text: str) -> None:
    # Names of files and layers may hold what rich takes for markup.
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))


def _say_fallbacks(fallbacks: "Fallbacks") -> None:
    for layer in fallbacks.damping_raised:
        _say(f"fallback: the damping of {layer} had to be raised")
    for policy, layers in fallbacks.experts.items():
        _say(f"fallback: {policy} for {len(layers)} layers of experts that too few tokens reached, e.g. {layers[0]}")
