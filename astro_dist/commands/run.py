"""The commands that do a run, foretell it, or hand it to a cluster."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from astro_dist.commands.output import AsJson, print_json, say_lines
from astro_dist.commands.run_options import takes_run
from astro_dist.console import waiting_for

if TYPE_CHECKING:
    from astro_dist.config.schema import RunConfig

__all__ = ["plan", "quantize", "submit"]


@takes_run
def quantize(settings: "RunConfig", as_json: AsJson = False) -> None:
    """Validate, plan, run, assemble, and publish where the configuration says so.

    Goes on where it was when the run directory holds this very run.
    """
    with waiting_for("loading the libraries"):
        from astro_dist import pipeline
    from astro_dist.report.command_output import summary_lines

    summary = pipeline.quantize(settings)
    if as_json:
        print_json(summary.to_json())
    else:
        say_lines(*summary_lines(summary, settings))


@takes_run
def plan(
    settings: "RunConfig",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers to plan for; else as many as `quantize` starts here, and 1 of a cluster."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu (this machine, measured), or a GPU: h100, a100, ...", show_default="this machine's GPU, or cpu"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the units of the run too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a run will need, from the headers alone: bytes, memory, disk, time.

    Reads no weight and begins no run. Refuses what `quantize` would refuse; a note says where the calibration text
    is not on this machine.
    """
    with waiting_for("reading the model's headers and the text"):
        from astro_dist.report.forecast import plan as foretell
        from astro_dist.report.plan_card import plan_table

        forecast = foretell(settings, workers, device)
    if as_json:
        print_json(forecast.to_json())
        return
    if verbose:
        Console().print(plan_table(forecast.prepared.plan))
    say_lines(*str(forecast).splitlines())


@takes_run
def submit(
    settings: "RunConfig",
    address: Annotated[str, typer.Option(help="Address of the job server, e.g. http://127.0.0.1:8265.")],
    follow: Annotated[bool, typer.Option(help="Show the job's log until it ends, and end with its exit code.")] = True,
) -> None:
    """Run `quantize` as a job of a Ray cluster. Submitted again after a failure, it goes on where it was."""
    from astro_dist.execution.ray_job import submit as submit_job

    code = submit_job(settings, address, say_lines, follow)
    if code:
        raise typer.Exit(code)
