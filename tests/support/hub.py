"""A token and a clock for tests that publish to a Hub on loopback."""

import time
import types

__all__ = ["TOKEN", "clock"]

TOKEN = "hf_" + "s3cr3t" * 5


def clock(waits):
    """Return a clock that appends to a list how long it should wait, and does not wait."""
    return types.SimpleNamespace(sleep=waits.append, time=time.time, perf_counter=time.perf_counter)
