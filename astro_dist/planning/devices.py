"""How fast devices compute and move data: the makers' figures for GPUs, a measurement for the machine at hand."""

import dataclasses
import re
import time
from collections.abc import Callable

import torch
from rich.filesize import decimal

from astro.errors import ConfigError
from astro.process import set_allocator
from astro.quantization.regularizer import PROX_PASSES, prox

__all__ = [
    "CUDA_CONTEXT_BYTES",
    "DEVICES",
    "Device",
    "gpu_here",
    "measure",
    "memory_shortage",
    "reads_weights_ahead",
    "usable_bytes",
]

_ACHIEVED = 0.6
"""Share of the makers' peak that large matrix products reach."""
CUDA_CONTEXT_BYTES = 500_000_000
"""Memory of a GPU that a process takes before it holds any tensor: CUDA's context, and the kernels of torch."""
_RESERVE = 0.03
"""Share of a GPU's memory that is not planned with: work spaces of libraries, gaps between tensors, and makers' round
numbers, which are up to 2 % above what torch sees."""
_GROUP_SIZE = 128
"""Number of columns in a group, where the regularizer's proximal map is timed."""


@dataclasses.dataclass(frozen=True)
class Device:
    """The speed and memory of a kind of device.

    Attributes:
        name: Name of the device, as `plan --device` takes it.
        float32: Operations per second of large float32 products, without TF32.
        bfloat16: Operations per second of large bfloat16 products.
        elements: Elements per second that elementwise operations go through.
        step_s: Seconds of a small dependent operation, such as those for a column of GPTQ: a kernel launch on a GPU.
        memory_bytes: Memory of the device; 0 where it uses the memory of the machine.
        storage: Bytes per second that are read from or written to the shared folder.
    """

    name: str
    float32: float
    bfloat16: float
    elements: float
    step_s: float
    memory_bytes: int
    storage: float


def _gpu(name: str, float32: float, bfloat16: float, gigabytes_s: float, gigabytes: int) -> Device:
    # Dense peaks in TFLOP/s, without sparsity; memory that is read and written; 1 GB/s a worker of a shared folder.
    rates = (float32 * 1e12 * _ACHIEVED, bfloat16 * 1e12 * _ACHIEVED, gigabytes_s * 1e9 / 8 * _ACHIEVED)
    return Device(name, *rates, 8e-6, gigabytes * 10**9, 1e9)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100-40", 19.5, 312, 1555, 40),
        _gpu("a100", 19.5, 312, 2039, 80),
        _gpu("h100", 67, 989, 3350, 80),
        _gpu("h200", 67, 989, 4800, 141),
        _gpu("b200", 75, 2250, 8000, 180),
        _gpu("l40s", 91.6, 362, 864, 48),
        _gpu("l4", 30.3, 121, 300, 24),
        _gpu("rtx4090", 82.6, 165, 1008, 24),
    )
}
"""NVIDIA's data sheets: float32 on CUDA cores, dense bfloat16 on tensor cores, bandwidth of the memory; SXM modules
where there are several."""


def gpu_here() -> Device | None:
    """Return the figures of this machine's first GPU by its name and memory; None where there is no GPU.

    Raises:
        ConfigError: The figures of this GPU are not known.
    """
    if not torch.cuda.is_available():
        return None
    set_allocator()  # what is asked for below uses the GPU, and a run may follow in this process
    properties = torch.cuda.get_device_properties(0)
    name = re.sub(r"[^a-z0-9]", "", properties.name.lower())
    alike = [model for model in (device.name.partition("-")[0] for device in DEVICES.values()) if model in name]
    if not alike:
        raise ConfigError(
            f"this machine's GPU is called {properties.name}, whose figures are not known here; say with --device what "
            f"comes nearest: cpu or one of {', '.join(DEVICES)}"
        )
    model = max(alike, key=len)  # an L40S is no L4
    of_model = [device for device in DEVICES.values() if device.name.partition("-")[0] == model]
    return min(of_model, key=lambda device: abs(device.memory_bytes - properties.total_memory))


def usable_bytes(memory_bytes: int) -> int:
    """Return how much of a GPU's memory is planned with; the rest is kept free for what is not foretold.

    Args:
        memory_bytes: All memory of the GPU.
    """
    return memory_bytes - int(_RESERVE * memory_bytes)


def memory_shortage(needed_bytes: float, available_bytes: float, device: str) -> str | None:
    """Say that a device is too small for a worker.

    Args:
        needed_bytes: Memory that the worker needs.
        available_bytes: Memory that the device has for it, a reserve being left.
        device: How the message calls the device, such as "a h100".

    Returns:
        The message, or None where the memory is enough.
    """
    if needed_bytes <= available_bytes:
        return None
    return (
        f"a worker needs about {decimal(int(needed_bytes))}, but {device} has {decimal(int(available_bytes))} for it; "
        "lower calibration.chunk_samples or calibration.sequence_length, or use devices with more memory"
    )


def reads_weights_ahead(device_type: str) -> bool:
    """Say whether a worker reads the next block's weights while it solves: not where that takes the solve's memory.

    Args:
        device_type: Type of the device, "cpu" or "cuda".
    """
    return device_type == "cuda"


def measure(threads: int, size: int = 1024, seconds: float = 0.1) -> Device:
    """Measure how fast the CPU of this machine is.

    Args:
        threads: Number of threads of a worker.
        size: Rows and columns of the square matrices whose product is timed.
        seconds: Time that each measurement takes.

    Returns:
        The CPU as a device.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # The time of one thread itself does not count what other programs take meanwhile; of several there is no such time.
    clock = time.thread_time if threads == 1 else time.perf_counter
    try:
        A = torch.randn(size, size)
        B, tau = A.bfloat16(), torch.ones(size // _GROUP_SIZE)
        float32 = 2.0 * size**3 / _time(lambda: A @ A, seconds, clock)
        bfloat16 = 2.0 * size**3 / _time(lambda: B @ B, seconds, clock)
        tile = A[: size // 2]
        elements = PROX_PASSES * tile.numel() / _time(lambda: prox(tile, tau, _GROUP_SIZE), seconds, clock)
        step_s = _time(lambda: torch.addcmul(A[0], A[1], A[2]), seconds, clock)
    finally:
        torch.set_num_threads(before)
    return Device("cpu", float32, bfloat16, elements, step_s, 0, 1e9)


def _time(action: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Seconds that an action takes when nothing else is in its way: the least of many."""
    action()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        action()
        least = min(least, clock() - start)
    return least
