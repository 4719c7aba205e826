"""A run that is interrupted between two calls of its workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from astro_dist.schedule.calls import Call, Result
from astro_dist.worker.worker import Worker

__all__ = ["Interrupted", "interrupted_after"]


class Interrupted(BaseException):
    """What ends the run; nothing catches it."""


@contextmanager
def interrupted_after(calls: int) -> Iterator[None]:
    """Let workers do so many calls, and expect the run in the body of a `with` statement to end at the next one."""
    left, real = [calls], Worker.do

    def counted(self: Worker, call: Call) -> Result:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return real(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "do", counted)
        with pytest.raises(Interrupted):
            yield
