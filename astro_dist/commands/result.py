"""The commands for a run directory and the model in it: how far it is, what it holds, where it goes."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from astro_dist.commands.output import AsJson, Trust, begin_with, print_json, require_runs, say_lines
from astro_dist.console import waiting_for

__all__ = ["publish", "report", "status", "verify"]

_WATCH_S = 2.0
"""Seconds between two looks at a run."""


def status(
    run: Annotated[Path, typer.Argument(help="Run directory (output.dir), or the model in it.", metavar="RUN")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds until the run ends.")] = False,
    as_json: AsJson = False,
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
        print_json(now.to_json())
    else:
        say_lines(*status_lines(now), *finished_lines(now, root))


def publish(
    run: Annotated[Path, typer.Argument(help="Run directory (output.dir) of a finished run.", metavar="RUN")],
    repo: Annotated[str, typer.Option(help="ORG/NAME of the repository on the Hub.", metavar="ORG/NAME")],
    revision: Annotated[str | None, typer.Option(help="Branch instead of main.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A new repository can be seen by everyone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a finished run to the Hub, or go on with that. Sends what is missing and makes one commit."""
    from astro_dist.config.yaml_file import make_target

    target = make_target(repo, not public, revision, pull_request)
    require_runs(run)
    from astro_dist.publish.publication import publish_run
    from astro_dist.report.command_output import publication_line
    from astro_dist.run_directory.layout import RunLayout

    published = publish_run(RunLayout.around(run).root, target)
    if as_json:
        print_json(published.to_json())
    else:
        say_lines(publication_line(published))


def report(run: Annotated[Path, typer.Argument(help="Run directory (output.dir).")]) -> None:
    """Write one HTML page and one parquet table of a run's layers, retries and fallbacks into its directory."""
    from astro_dist.report.findings import Findings
    from astro_dist.report.html import write_report
    from astro_dist.report.run_lines import report_lines
    from astro_dist.run_directory.layout import RunLayout

    findings = Findings.read(RunLayout.around(run).root)
    say_lines(f"written: {write_report(findings)}", *report_lines(findings))


def verify(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a quantized model or of its run, or ORG/NAME\\[@REVISION] on the Hub.", metavar="MODEL"
        ),
    ],
    against: Annotated[str | None, typer.Option(help="The source it was made from: also each layer's error.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer's error, not the ten largest.")] = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Read a written model again: every tensor is there, shapes fit, scales are finite, index and config agree."""
    begin_with(model, against)
    with waiting_for("loading the libraries"):
        from astro_dist.export.verify import verify_model
        from astro_dist.report.command_output import verification_lines

    verification = verify_model(model, against, trust)
    if as_json:
        print_json(verification.to_json())
    else:
        say_lines(*verification_lines(verification, against, show_all))
