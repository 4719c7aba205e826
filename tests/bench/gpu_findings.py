"""What the steps of `gpu.py` share: findings, clocks that wait for the device, and inputs."""

import argparse
import contextlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Bench", "far", "hessians", "inputs", "weights"]


class Bench:
    """A step on its device.

    Attributes:
        device: The device.
        tiny: Whether sizes are those that a CPU does in seconds.
        work: Folder for models and runs, which steps share.
    """

    def __init__(self, step: str, options: argparse.Namespace) -> None:
        self.device, self.tiny, self.work = torch.device(options.device), options.tiny, options.work
        self._step, self._path = step, options.out / "findings.jsonl"
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("highest")

    def say(self, name: str, **found: Any) -> None:
        """Write a finding, and print it in short."""
        line = {"step": self._step, "name": name, **found}
        with self._path.open("a") as handle:
            handle.write(json.dumps(line, default=str) + "\n")
        print(f"{self._step}, {name}: {json.dumps(found, default=str)[:400]}", flush=True)

    @contextlib.contextmanager
    def finding(self, name: str) -> Iterator[dict[str, Any]]:
        """Collect a finding in the body. What fails there is one too, and the step goes on."""
        found: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            yield found
            self.wait()
            found.setdefault("ok", True)
        except Exception as error:
            lines = [line.strip() for line in traceback.format_exc().splitlines() if "astro" in line]
            found |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}", "lines": lines[-5:]}
        self.say(name, took_s=round(time.perf_counter() - start, 2), **found)

    def wait(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], repeats: int = 3, warm: int = 1) -> float:
        """Return the least seconds of an action, the device at rest before and after."""
        for _ in range(warm):
            action()
        least = math.inf
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            action()
            self.wait()
            least = min(least, time.perf_counter() - start)
        return least

    def peak_gb(self, reset: bool = False) -> float:
        """Return the most memory of the device that torch gave out since the last reset, in GB; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)

    def places(self) -> dict[str, torch.device]:
        """Return where things are compared: the CPU, and the device twice."""
        return {"cpu": torch.device("cpu"), "device": self.device, "again": self.device}


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return correlated tokens whose columns are of very different sizes, float32 [T, C] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(columns // 4, 1)
    mix = torch.randn(rank, columns, generator=generator)
    size = torch.rand(columns, generator=generator) ** 3 + 0.02
    common = torch.randn(tokens, rank, generator=generator) @ mix / rank**0.5
    return (common + 0.1 * torch.randn(tokens, columns, generator=generator)) * size


def weights(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return heavy-tailed weights, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(*shape, generator=generator) * 0.05


def hessians(count: int, columns: int) -> torch.Tensor:
    """Return the mean of xxᵀ of several inputs, float32 [B, C, C] on the CPU."""
    tokens = [inputs(2 * columns + 64, columns, seed) for seed in range(count)]
    return torch.stack([X.T @ X / len(X) for X in tokens])
