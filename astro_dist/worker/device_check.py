"""Whether a worker can compute on its device: a GPU that torch can use, with a driver that is new enough, and memory.

What is wrong there would be wrong for every call. So it is said before the first one, with what to install.
"""

import contextlib
import gc
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rich.filesize import decimal

from astro.errors import ConfigError, MemoryShortage, RunError
from astro.process import says_out_of_memory, set_allocator
from astro_dist.planning.devices import CUDA_CONTEXT_BYTES, memory_shortage, usable_bytes

__all__ = ["gpu_trouble", "has_gpu", "require_gpu", "require_memory", "takes_gpu", "within_memory"]

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
"""Where the NVIDIA driver of Linux says which it is, and has a folder for each GPU."""
_LEAST_DRIVERS = {"11": "450.80", "12": "525.60", "13": "580.65"}
"""Oldest driver for each major version of CUDA, by NVIDIA's table of minor version compatibility."""
_RUN_KEY = "execution.device:"
"""What the user gives the device of a run by."""
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")

T = TypeVar("T")


def has_gpu() -> bool:
    """Tell whether this machine has an NVIDIA GPU that is not hidden from this process, or another that torch can use.

    It may have one that torch cannot use, see `gpu_trouble`.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return (_GPU_FOLDER.is_dir() and any(_GPU_FOLDER.iterdir())) or torch.cuda.is_available()


def takes_gpu(device: str, key: str = _RUN_KEY) -> bool:
    """Tell whether this process is to compute on a GPU. One that is there is never passed over in silence.

    Args:
        device: Kind of device that the user asks for: "cpu", "cuda", or "auto" for a GPU where this machine has one.
        key: What the user gives the device by, such as "execution.device:".

    Raises:
        ConfigError: This machine has a GPU that torch cannot use, or has none although one is asked for.
    """
    if device == "cpu" or (device == "auto" and not has_gpu()):
        return False
    trouble = gpu_trouble(key)
    if trouble:
        begin = "this machine has a GPU" if device == "auto" else "a GPU of this machine is asked for"
        raise ConfigError(f"{key} {device}: {begin}, but {trouble}")
    return True


def gpu_trouble(key: str = _RUN_KEY) -> str | None:
    """Say why torch can use no GPU of this machine, and what to install; None where it can.

    A tiny sum is computed, because kernels may be missing for a GPU that torch sees. For a process it is the first use
    of the GPU, so torch is told before how to allocate.

    Args:
        key: What the user gives the device by, for the advice.
    """
    set_allocator()
    driver, cuda = _driver_version(), torch.version.cuda or torch.version.hip
    there = f"the NVIDIA driver here is {driver}" if driver else f"no NVIDIA driver is loaded here (no {_DRIVER_FILE})"
    if cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA, and {there}; install a torch for CUDA "
            f"(https://pytorch.org/get-started), or set {key} cpu"
        )
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        if says_out_of_memory(str(error)):
            return (
                f"not even a tiny sum fits into the memory of its GPU: {_first_line(error)}; end what holds it "
                "(`nvidia-smi` lists the processes), or take other GPUs (CUDA_VISIBLE_DEVICES)"
            )
        least = _LEAST_DRIVERS.get(cuda.split(".")[0])
        newer = f"a driver of at least {least}" if least else "a driver for that CUDA"
        return (
            f"torch {torch.__version__} is built for CUDA {cuda} and can use no GPU: {_first_line(error)}; {there}. "
            f"Install {newer} (https://www.nvidia.com/drivers) or a torch for an older CUDA "
            f"(https://pytorch.org/get-started), or set {key} cpu"
        )
    return None


def require_gpu(key: str = _RUN_KEY) -> None:
    """Refuse a machine whose GPU torch cannot use.

    Args:
        key: What the user sets to take the CPU, for the message.

    Raises:
        RunError: There is none, its driver is too old, or torch has no kernels for it.
    """
    trouble = gpu_trouble(key)
    if trouble:
        raise RunError(f"{platform.node()}: {trouble}")


def require_memory(needed_bytes: int, device: torch.device) -> None:
    """Refuse a device that has too little memory left, before anything is loaded.

    Args:
        needed_bytes: Memory that a worker is expected to need, in bytes; on a GPU with CUDA's context.
        device: The device.

    Raises:
        RunError: The device has less memory; the message gives both sizes.
    """
    place, beside = "this machine", ""
    if device.type == "cuda":
        gc.collect()  # a worker before this one may have been in this very process
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        usable = usable_bytes(total)
        available = free - (total - usable) + CUDA_CONTEXT_BYTES  # the context is there by now
        name = torch.cuda.get_device_name(device)
        place = f"its {name}, of whose {decimal(total)} {decimal(free)} are free,"
        if needed_bytes <= usable:
            beside = ". Other processes hold the rest of it: `nvidia-smi` lists them"
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shortage = memory_shortage(needed_bytes, available, place)
    if shortage:
        raise RunError(f"{platform.node()}: {shortage}{beside}")


def within_memory(action: Callable[[], T], device: torch.device) -> T:
    """Do something, and say how much memory was wanted and free where that was too little.

    The error does not hold on to what failed, whose tensors would keep the memory.

    Args:
        action: What is done.
        device: Device that it computes on.

    Raises:
        MemoryShortage: There was too little memory.
    """
    try:
        return action()
    except (torch.OutOfMemoryError, MemoryError) as error:
        shortage = _shortage(error, device)
    except RuntimeError as error:
        if not says_out_of_memory(str(error)):
            raise
        shortage = _shortage(error, device)
    raise shortage


def _shortage(error: Exception, device: torch.device) -> MemoryShortage:
    match = _WANTED.search(str(error))
    wanted = f"{match[1]} more were wanted" if match else _first_line(error)
    state = ""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_allocated(device)
            name = torch.cuda.get_device_name(device)
            state = f"; of the {decimal(total)} of this {name} {decimal(free)} were free, and it held {decimal(held)}"
    return MemoryShortage(f"{platform.node()}: out of memory: {wanted}{state}")


def _driver_version() -> str | None:
    """Version of the NVIDIA driver, such as 550.54.15; None where none is loaded."""
    with contextlib.suppress(OSError):
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
        return match[0] if match else None
    return None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
