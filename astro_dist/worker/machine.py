"""Where a worker runs, and how much memory it used there."""

import platform
from typing import Any

import torch

from astro.process import peak_rss_bytes

__all__ = ["describe_machine"]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return where this process runs and the most memory that it ever used, as JSON types.

    Args:
        device: Device that it computes on.
    """
    on_gpu = device.type == "cuda"
    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    }
