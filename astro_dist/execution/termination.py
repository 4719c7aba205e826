"""What SIGTERM does, by which Slurm, Kubernetes and spot instances end a process: the run is ended within seconds."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["EXIT_CODE", "KEPT", "MESSAGE", "Terminated", "Termination", "keep_handler"]

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM has ended, as a shell tells it: 143."""
MESSAGE = "stopped by SIGTERM"
KEPT = "; what is finished is kept"
_GRACE_S = 12.0
"""Seconds in which workers and cluster are ended in order. After that the process ends as it is: Kubernetes and Slurm
kill it 30 s after the signal, and the notice of a spot instance may be as short. What is finished is on disk anyway."""


class Terminated(BaseException):
    """SIGTERM arrived. It is no `Exception`, so that nothing takes it for a failure that can be mended."""


class Termination:
    """Tells whether SIGTERM has arrived, and what an end before the work is done means for that work.

    Attributes:
        has_come: Whether it has.
        keeps_work: Whether the command keeps what is finished, and goes on with it when it is run again; None as long
            as no command is known.
    """

    def __init__(self) -> None:
        """Begin without the signal and without a command."""
        self.has_come = False
        self.keeps_work: bool | None = None

    @property
    def advice(self) -> str:
        """What is said behind `MESSAGE`, or behind another reason to end early."""
        if self.keeps_work is None:
            return ""
        return f"{KEPT}, run the same command to go on" if self.keeps_work else "; run the same command to begin anew"

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Let SIGTERM raise `Terminated` in this thread, which must be the main one, as long as the context lasts.

        A long call into native code delays the exception, and a cluster that is gone may delay the end of its
        workers. So a thread, which is told by the signal itself, ends the process when the grace time is over.
        """
        before = signal.signal(signal.SIGTERM, self._raise)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._end_in_time, args=(reading,), name="termination", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup_before)
            os.close(writing)
            signal.signal(signal.SIGTERM, before)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self.has_come:  # a second signal must not disturb the clearing up
            self.has_come = True
            raise Terminated

    def _end_in_time(self, reading: int) -> None:
        """Wait for SIGTERM, and then for the end of the grace time, and end the process; return if the pipe closes."""
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(_GRACE_S)
                os.write(2, f"{MESSAGE}{self.advice}\n".encode())
                os._exit(EXIT_CODE)
        os.close(reading)


@contextlib.contextmanager
def keep_handler() -> Iterator[None]:
    """Set the handler of SIGTERM again that there is now, if there is any, when the context ends: Ray sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
