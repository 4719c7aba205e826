"""A run in simulated time: the real schedule, workers of any number, and what each call would take. Pure."""

import dataclasses
import heapq
from collections.abc import Callable

from astro_dist.schedule.calls import Call, Result, Schedule, assign

__all__ = ["Simulated", "simulate"]


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What came out.

    Attributes:
        wall_s: from the first call to the last.
        busy_s: of all workers together.
        by_verb: Seconds of all workers by what they do, see `verb` of the calls.
    """

    wall_s: float
    busy_s: float
    by_verb: dict[str, float]

    def efficiency(self, workers: int) -> float:
        """Share of the workers' time in which they had something to do."""
        return self.busy_s / (workers * self.wall_s) if self.wall_s else 1.0


def simulate(
    schedule: Schedule, workers: int, seconds: Callable[[Call], float], result: Callable[[Call], Result]
) -> Simulated:
    """Let workers do a schedule.

    Args:
        schedule: at its beginning.
        workers: that all do the same.
        seconds: that a call takes.
        result: that a call returns, as far as the schedule looks at it.
    """
    now, busy = 0.0, 0.0
    by_verb: dict[str, float] = {}
    ends: list[tuple[float, int, Call]] = []
    free = list(range(workers))
    while not schedule.complete:
        for worker, call in list(assign(schedule, free)):
            took = seconds(call)
            busy += took
            by_verb[call.verb] = by_verb.get(call.verb, 0.0) + took
            heapq.heappush(ends, (now + took, worker, call))
            free.remove(worker)
        assert ends, "the schedule waits for itself"
        now, worker, call = heapq.heappop(ends)
        schedule.done(worker, call, result(call))
        free = sorted([*free, worker])
    return Simulated(now, busy, by_verb)
