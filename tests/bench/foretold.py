"""How well time is foretold: by `plan` before a run, and by the display at 25, 50 and 75 % of it.

    python tests/bench/foretold.py MODEL --work FOLDER [--set calibration.samples=8 ...]

Each run is the command itself, with workers on Ray. What the display showed is in the journal.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from astro_dist import plan, run_config
from astro_dist.run_directory.journal import Event, Finished, Foretold, Joined, Journal

RUNS = (("blocks", 1), ("blocks", 2), ("stages", 2), ("sequential", 2))
SHARES = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Told:
    """What was told of one run, and what became true; all times are in seconds.

    Attributes:
        planned: What `plan` foretold.
        took: What the work took, from the first worker that was up to the last unit.
        shown: Time left as the display showed it, at each of `SHARES` of the time that the work took.
    """

    planned: float
    took: float
    shown: tuple[float | None, ...]

    def row(self) -> str:
        """Return the cells of a table: what was shown, and by which share of the whole that was wrong."""
        cells = []
        for share, shown in zip(SHARES, self.shown, strict=True):
            left = (1 - share) * self.took
            cells.append("-" if shown is None else f"{shown:.0f} / {left:.0f} ({(shown - left) / self.took:+.0%})")
        return " | ".join([f"{self.planned:.0f} / {self.took:.0f}", *cells])


def told_in(events: Sequence[Event], planned: float) -> Told:
    """Read from a journal what its only session was told.

    Args:
        events: Events of the journal.
        planned: What `plan` foretold, in seconds.
    """
    begin = next(event.time for event in events if isinstance(event, Joined))
    end = max(event.time for event in events if isinstance(event, Finished))
    forecasts = [event for event in events if isinstance(event, Foretold)]
    shown = []
    for share in SHARES:
        now = begin + share * (end - begin)
        last = next((event for event in reversed(forecasts) if event.time <= now), None)
        shown.append(None if last is None else max(last.time + last.seconds_left - now, 0.0))
    return Told(planned, end - begin, tuple(shown))


def main() -> None:
    """Do the runs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    options = parser.parse_args()
    print("| mode | workers | planned / took | at 25 %: shown / true | at 50 % | at 75 % |\n|---|---|---|---|---|---|")
    for mode, workers in RUNS:
        output = options.work / f"{mode}-{workers}"
        shutil.rmtree(output, ignore_errors=True)
        assignments = [*options.assignments, f"execution.workers={workers}", "execution.device=cpu"]
        planned = plan(run_config(options.model, assignments, mode=mode, output=output), workers).needed.wall_s
        settings = [part for assignment in assignments for part in ("--set", assignment)]
        command = [
            sys.executable,
            "-m",
            "astro_dist",
            "quantize",
            options.model,
            "--mode",
            mode,
            "--output",
            str(output),
        ]
        subprocess.run([*command, *settings], check=True)
        told = told_in(Journal(output / "journal.jsonl").events(), planned)
        print(f"| `{mode}` | {workers} | {told.row()} |", flush=True)


if __name__ == "__main__":
    main()
