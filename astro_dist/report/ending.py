"""Why a run does not go on, and how to go on with it."""

import dataclasses
import shlex

import astro
from astro_dist.report.findings import Findings
from astro_dist.run_directory.journal import Failed, Finished
from astro_dist.wording import counted

__all__ = ["Ending", "ending_of"]


@dataclasses.dataclass(frozen=True)
class Ending:
    """Says why a run stopped and what to do.

    Attributes:
        reason: Reason, in a sentence.
        advice: What to do, in a sentence.
        command: Command that goes on with the run.
    """

    reason: str
    advice: str
    command: str


def ending_of(findings: Findings) -> Ending:
    """Say why a run stopped, and how to go on with it.

    Args:
        findings: What the run directory says.
    """
    status = findings.status
    later: list[Failed] = []
    for event in findings.session:
        if isinstance(event, Finished):
            later.clear()
        elif isinstance(event, Failed):
            later.append(event)
    if later:
        last = later[-1]
        place = status.words.unit(last.unit)
        reason = f"The last call failed: {place}, {last.method} on worker {last.worker}: {last.cause}"
    elif status.units.done == status.units.total:
        reason = "All units are finished, but the model was not put together to the end."
    else:
        reason = "No failure is noted after the last finished unit: it was interrupted, or its process was ended."
    version, here = findings.identity.version, astro.__version__
    kept = f"{status.units.done} of {counted(status.units.total, 'unit')} are finished and kept."
    only = f" Only version {version} goes on with it; this is {here}." if version != here else ""
    command = f"astro-dist quantize {shlex.quote(str(findings.run.config))}"
    return Ending(reason, f"{kept}{only} To go on, run:", command)
