"""The memory of a GPU that is not there: tensors of true sizes without numbers, of which those that live are counted.

Torch without CUDA cannot index a fake CUDA tensor. So the device is "meta" here, and all that is done otherwise on a
GPU takes it for one. What asks for a number gets a harmless one.
"""

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from astro.calibration import hessian
from astro.linalg import bf16_matmul, cholesky, panels, symmetric, tiling
from astro.quantization import grid, regularizer

__all__ = ["DEVICE", "CountedMemory", "counted_memory", "peak_bytes"]

DEVICE = torch.device("meta")
"""What stands for the GPU."""

_ROOT = Path(__file__).parents[2]
_PAGE = 512
"""Bytes to which torch rounds what it allocates on a GPU."""


@dataclasses.dataclass
class CountedMemory:
    """What lives on the fake GPU.

    Attributes:
        now: Bytes that are held.
        peak: Most bytes that were held since it was last set.
        place: Lines of this project that were at work when the peak was reached, the innermost first.
    """

    now: int = 0
    peak: int = 0
    place: list[str] = dataclasses.field(default_factory=list)

    def restart(self) -> None:
        """Count the peak anew, from what is held now."""
        self.peak, self.place = self.now, []


class _Counting(TorchDispatchMode):
    def __init__(self, memory: CountedMemory, device: torch.device, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._memory, self._device = memory, device
        self._live: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, memory = storage._cdata, self._memory
        if key in self._live:
            return
        self._live[key] = -(-storage.nbytes() // _PAGE) * _PAGE
        memory.now += self._live[key]
        weakref.finalize(storage, self._free, key)
        if memory.now > memory.peak:
            memory.peak, memory.place = memory.now, _lines()

    def _free(self, key: int) -> None:
        self._memory.now -= self._live.pop(key, 0)


@contextlib.contextmanager
def counted_memory() -> Iterator[CountedMemory]:
    """Run the body of a `with` statement on fake tensors, and count what lives on the fake GPU.

    Columns are not settled one by one, which takes no memory but would take minutes.
    """
    memory = CountedMemory()
    nothing = lambda *_: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        for module in (hessian, cholesky, regularizer, grid):
            if hasattr(module, "first_of"):
                stack.enter_context(mock.patch.object(module, "first_of", nothing))
        stack.enter_context(mock.patch.object(regularizer, "near_rows", lambda X: [slice(0, X.shape[-2])]))
        for sizes in (symmetric._STRIP, tiling.TILE_ELEMENTS):
            stack.enter_context(mock.patch.dict(sizes, meta=sizes["cuda"]))
        stack.enter_context(mock.patch.object(bf16_matmul, "_is_faster", return_value=True))
        stack.enter_context(mock.patch.object(panels.Panels, "settle_", nothing))
        stack.enter_context(mock.patch.object(torch.Tensor, "__bool__", return_value=True))
        for kind in (torch.Tensor, FakeTensor):
            stack.enter_context(mock.patch.object(kind, "tolist", lambda self: _ones(tuple(self.shape), self.dtype)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Counting(memory, DEVICE))
        yield memory


def peak_bytes(action: Callable[[], object], before: Iterable[torch.Tensor] = ()) -> int:
    """Return the most bytes of tensors on the CPU that live at once while something is done, beside those before.

    Args:
        action: What is done.
        before: Tensors that are there before, and of which views may be taken.
    """
    memory = CountedMemory()
    with _Counting(memory, torch.device("cpu"), before):
        action()
    return memory.peak


def _ones(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    one = 1.0 if dtype.is_floating_point else 1
    return [_ones(shape[1:], dtype) for _ in range(shape[0])] if shape else one


def _lines() -> list[str]:
    """Lines of this project on the way to here, the innermost first."""
    lines, frame = [], sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and "tests" not in path.parts and "site-packages" not in path.parts:
            lines.append(f"{path.relative_to(_ROOT)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return lines[:4]
