"""A run is simulated: the real schedule, any number of workers, and the time that each call would take."""

import dataclasses
import heapq
from collections.abc import Callable

from astro_dist.schedule.calls import Call, Result
from astro_dist.schedule.schedule import Schedule, assign

__all__ = ["Simulated", "simulate"]


@dataclasses.dataclass(frozen=True)
class Simulated:
    """How long a simulated run took.

    Attributes:
        wall_s: Seconds from the first call to the end of the last.
        busy_s: Seconds in which workers had something to do, of all workers together.
        by_verb: Seconds of all workers by what they do, which is the `verb` of a call.
    """

    wall_s: float
    busy_s: float
    by_verb: dict[str, float]

    def efficiency(self, workers: int) -> float:
        """Return the share of the workers' time in which they had something to do.

        Args:
            workers: Number of workers that were simulated.
        """
        return self.busy_s / (workers * self.wall_s) if self.wall_s else 1.0


def simulate(
    schedule: Schedule, workers: int, seconds: Callable[[Call], float], result: Callable[[Call], Result]
) -> Simulated:
    """Simulate workers that carry out a schedule.

    Args:
        schedule: Schedule from whose beginning the workers start. It is complete afterwards.
        workers: Number of workers.
        seconds: Function that returns how many seconds a call takes.
        result: Function that returns the result of a call, as far as the schedule reads it.

    Returns:
        The times of the run.
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
