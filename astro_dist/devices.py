"""How fast devices compute and move data: the makers' figures for GPUs, a measurement for the machine at hand."""

import dataclasses
import time

import torch

__all__ = ["DEVICES", "Device", "measure", "memory_shortage"]

_ACHIEVED = 0.6
"""Share of the makers' peak that large matrix products reach."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of worker.

    Attributes:
        name: as `plan --device` takes it.
        float32: operations a second of large float32 products, without TF32.
        bfloat16: operations a second of large bfloat16 products.
        step_s: seconds of one small dependent operation, such as a column of GPTQ: a kernel launch on a GPU.
        memory_bytes: of the device; 0 where it is the machine's own.
        storage: bytes a second from and to the shared folder.
    """

    name: str
    float32: float
    bfloat16: float
    step_s: float
    memory_bytes: int
    storage: float


def _gpu(name: str, float32: float, bfloat16: float, gigabytes: int) -> Device:
    # Dense peaks in TFLOP/s, without sparsity; 1 GB/s a worker of a shared folder.
    return Device(name, float32 * 1e12 * _ACHIEVED, bfloat16 * 1e12 * _ACHIEVED, 8e-6, gigabytes * 10**9, 1e9)


DEVICES = {
    device.name: device
    for device in (
        _gpu("a100-40", 19.5, 312, 40),
        _gpu("a100", 19.5, 312, 80),
        _gpu("h100", 67, 989, 80),
        _gpu("h200", 67, 989, 141),
        _gpu("b200", 75, 2250, 180),
        _gpu("l40s", 91.6, 362, 48),
        _gpu("l4", 30.3, 121, 24),
        _gpu("rtx4090", 82.6, 165, 24),
    )
}
"""NVIDIA's data sheets: float32 on CUDA cores, dense bfloat16 on tensor cores; SXM modules where there are several."""


def memory_shortage(needed_bytes: float, there_bytes: float, device: str) -> str | None:
    """What to say of a device that is too small for a worker; nothing where it is large enough."""
    if needed_bytes <= there_bytes:
        return None
    return (
        f"a worker needs about {needed_bytes / 1e9:.1f} GB, but {device} has {there_bytes / 1e9:.1f} GB; lower "
        "calibration.chunk_samples, or use devices with more memory"
    )


def measure(threads: int, size: int = 1024, seconds: float = 0.3) -> Device:
    """The CPU at hand, with some threads a worker.

    Args:
        threads: of one worker.
        size: of the square matrices whose product is timed.
        seconds: to measure each for.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        float32, bfloat16 = (_rate(dtype, size, seconds) for dtype in (torch.float32, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    return Device("cpu", float32, bfloat16, 3e-6, 0, 1e9)


def _rate(dtype: torch.dtype, size: int, seconds: float) -> float:
    A = torch.randn(size, size).to(dtype)
    A @ A
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        A @ A
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - start)
