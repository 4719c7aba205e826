"""How much of a run's work is done, and how much time is left: the plan's forecast, corrected by what was measured."""

import copy
from collections.abc import Callable

from astro_dist.planning.simulate import simulate
from astro_dist.schedule.calls import Call, Result
from astro_dist.schedule.schedule import Schedule

__all__ = ["Outlook"]


class Outlook:
    """Foretells what is left of a session.

    The plan says how the kinds of calls compare on an ideal device. Each kind's own times replace that as soon as there
    are some: a solve that takes twice as long as foretold will do so in every block.
    """

    def __init__(
        self,
        schedule: Schedule,
        workers: int,
        seconds: Callable[[Call], float],
        result: Callable[[Call], Result],
    ) -> None:
        """Simulate what is left of a run.

        Args:
            schedule: Schedule as the session begins with it, which is not altered.
            workers: Number of workers.
            seconds: Function that foretells how many seconds a call takes.
            result: Function that returns the result of a call, as far as the schedule reads it.
        """
        simulated = simulate(copy.deepcopy(schedule), workers, seconds, result)
        self._seconds, self._workers = seconds, workers
        self._efficiency = max(simulated.efficiency(workers), 1 / workers)
        self._foretold = dict(simulated.by_verb)
        self._done = dict.fromkeys(self._foretold, 0.0)
        self._measured = dict.fromkeys(self._foretold, 0.0)

    def took(self, call: Call, seconds: float) -> None:
        """Count a call that returned.

        Args:
            call: Call that returned.
            seconds: Time that it took, in seconds.
        """
        verb = call.verb
        self._done[verb] = self._done.get(verb, 0.0) + self._seconds(call)
        self._measured[verb] = self._measured.get(verb, 0.0) + seconds
        # A call that was done again is work that was not foretold.
        self._foretold[verb] = max(self._foretold.get(verb, 0.0), self._done[verb])

    @property
    def share_done(self) -> float:
        """The share of the session's work that is done, from 0 to 1."""
        left, measured = self._left(), sum(self._measured.values())
        return measured / (measured + left) if measured + left else 1.0

    @property
    def seconds_left(self) -> float:
        """The time until the session's end, in seconds."""
        return self._left() / (self._workers * self._efficiency)

    def resized(self, workers: int) -> None:
        """Count with another number of workers from now on.

        Args:
            workers: Number of workers that are up, at least 1.
        """
        self._workers = max(workers, 1)

    def _left(self) -> float:
        """The time of all workers together that is left, in seconds."""
        done, measured = sum(self._done.values()), sum(self._measured.values())
        usual = measured / done if done else 1.0
        left = 0.0
        for verb, foretold in self._foretold.items():
            pace = self._measured[verb] / self._done[verb] if self._done.get(verb) else usual
            left += (foretold - self._done.get(verb, 0.0)) * pace
        return left
