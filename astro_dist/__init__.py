"""Where and when: configuration, plan, workers, executors and the run.

The names below are what a program or a notebook needs. They are loaded when they are used, since most of them import
torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astro_dist.config.schema import RunConfig
    from astro_dist.pipeline import quantize
    from astro_dist.planning.settings import run_config
    from astro_dist.report.forecast import plan
    from astro_dist.report.status import read_status as status

__all__ = ["RunConfig", "plan", "quantize", "run_config", "status"]

_PLACES = {
    "__version__": ("astro", "__version__"),
    "RunConfig": ("astro_dist.config.schema", "RunConfig"),
    "plan": ("astro_dist.report.forecast", "plan"),
    "quantize": ("astro_dist.pipeline", "quantize"),
    "run_config": ("astro_dist.planning.settings", "run_config"),
    "status": ("astro_dist.report.status", "read_status"),
}


def __dir__() -> list[str]:
    return sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
