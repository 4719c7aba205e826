"""What tests share that publish to a Hub on loopback."""

import time
import types

__all__ = ["TOKEN", "clock"]

TOKEN = "hf_" + "s3cr3t" * 5


def clock(waits):
    """A clock that notes instead of waiting."""
    return types.SimpleNamespace(sleep=waits.append, time=time.time, perf_counter=time.perf_counter)
