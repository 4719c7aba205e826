"""How long a call may take before it is taken to hang."""

import dataclasses
from collections.abc import Callable

from astro_dist.config.schema import RunConfig
from astro_dist.planning.cost import CostModel
from astro_dist.schedule.calls import Call, LoadWeights, OpenBlock

__all__ = ["deadlines"]

_PATIENCE_S = 600.0
"""Seconds that any call may take, however little work it is."""
_SLACK = 20.0
"""Factor between the time that a slow device would need and the time that a call may take."""
_SLOWEST_CORE, _SLOWEST_GPU = 5e9, 1e12
"""Operations a second of a CPU core and of a GPU that are slower than any device in use."""
_CRAWL = 5e6
"""Bytes a second of a shared folder that is slower than any in use."""


def deadlines(config: RunConfig, cost: CostModel, device_type: str) -> Callable[[Call], float]:
    """Return a function that gives the seconds after which a call is taken to hang, many times what it should need.

    Args:
        config: Configuration of the run, which may name the seconds.
        cost: What calls of the run cost.
        device_type: Type of the workers' devices, "cpu" or "cuda".
    """
    timeout_s = config.execution.call_timeout_s
    if timeout_s != "auto":
        return lambda call: timeout_s
    rate = _SLOWEST_GPU if device_type == "cuda" else _SLOWEST_CORE * config.execution.cpu_threads

    def at_worst(call: Call) -> float:
        if isinstance(call, OpenBlock | LoadWeights):
            call = dataclasses.replace(call, was_foretold=False)  # what is read ahead may be yet to be read
        work = cost.work(call)
        operations = work.compute + work.rounded + work.exact
        return _PATIENCE_S + _SLACK * operations / rate + work.moved_bytes / _CRAWL

    return at_worst
