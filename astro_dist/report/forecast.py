"""What a run will be and need, told before it begins."""

import dataclasses
from typing import Any

from astro_dist.config.schema import RunConfig
from astro_dist.planning.estimate import Estimate
from astro_dist.planning.forecast import forecast
from astro_dist.planning.validate import Prepared, prepare, require_text
from astro_dist.planning.worker_count import count_note
from astro_dist.report.plan_card import plan_card

__all__ = ["Forecast", "plan"]


@dataclasses.dataclass(frozen=True, repr=False)
class Forecast:
    """What a run will be and need. Printed, or as the value of a notebook's cell, it is the card of the plan.

    Attributes:
        prepared: The run, after all checks.
        needed: Memory, disk, traffic and time that it needs.
    """

    prepared: Prepared
    needed: Estimate

    def __repr__(self) -> str:
        return "\n".join(plan_card(self.prepared, self.needed))

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as a JSON object."""
        limit = self.prepared.tensor_parallel
        return {
            **self.prepared.plan.summary(),
            "corrections_bytes": self.prepared.corrections.size_bytes,
            "needed": dataclasses.asdict(self.needed),
            "notes": list(self.prepared.notes),
            "tensor_parallel": {"size": limit.size, **dataclasses.asdict(limit)},
        }


def plan(config: RunConfig, workers: int | None = None, device: str | None = None) -> Forecast:
    """Foretell what a run will need, from the headers of its checkpoint alone. Nothing is started or written.

    Args:
        config: Configuration of the run.
        workers: Number of workers. None stands for as many as the run will start, or 1 where only its cluster tells.
        device: Name of a GPU, such as `h100`, or `cpu` for the CPU of this machine, which is measured. None stands for
            what the run would take here: this machine's GPU where it has one.

    Raises:
        InputError: Something that the user gave is wrong; `quantize` would refuse it too.
    """
    prepared = prepare(config)
    prepared = require_text(prepared)
    needed = forecast(prepared, workers, device)
    note = None if workers else count_note(config.execution, has_gpus=needed.device != "cpu")
    if note:
        prepared = dataclasses.replace(prepared, notes=(*prepared.notes, note))
    return Forecast(prepared, needed)
