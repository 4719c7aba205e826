"""A GPU without data: tensors that have shapes alone, and a record of what would happen on it.

Torch's tensors on the device "meta" stand for those on a GPU, at true sizes, and say that they are on "cuda". No GPU
and no build of torch for one is needed. `FakeGpu` follows every operator: which of them read tensors of two devices,
where the host would wait for a value, what crosses between CPU and GPU, and how much memory is held at most.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from astro.linalg import bf16_matmul

__all__ = ["FakeGpu", "fake_gpu"]

_PAGE = 512
"""Torch gives out memory of a GPU in multiples of so many bytes."""
_ROOT = str(Path(__file__).parents[2] / "astro") + "/"
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2")
_COPIES = ("aten::copy_", "aten::_to_copy")
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_OF_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
"""Functions that copy numbers of Python to the device. No operator shows it."""
_DEVICE_OF = torch.Tensor.device.__get__
_GPU, _META = torch.device("cuda"), torch.device("meta")


class FakeGpu(TorchDispatchMode):
    """Follows operators on tensors without data.

    Every value that the host asks for is 1 or true, and `nonzero` finds nothing: no check fails then.

    Attributes:
        mixed: Number of operators, by name and place, that read tensors of the GPU beside tensors of the CPU which are
            no scalars. Copies may.
        waits: Number of times, by place, that the host would wait for a value.
        crossings: Number of copies between CPU and GPU, by place, those of a list of Python too. Memory that is not
            pinned makes the host wait for them.
        launches: Number of operators by place.
        peak_bytes: Most memory that was held at once.
        peak_place: The place that asked for it: the file and the function of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.waits, self.launches, self.crossings = Counter(), Counter(), Counter(), Counter()
        self.peak_bytes, self.peak_place = 0, ""
        self._held: dict[int, int] = {}
        self._held_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.is_view:
            return func(*args, **(kwargs or {}))
        place, name = _place(), func.name().split(".")[0]
        devices = {_real_device(X).type for X in _tensors([args, list((kwargs or {}).values())]) if X.ndim}
        if len(devices) > 1 and name not in _COPIES:
            self.mixed[name, place] += 1
        if name in _COPIES and _crosses(args, kwargs or {}):
            self.crossings[place] += 1
        self.launches[place] += 1
        if name in _WAITS:
            self.waits[place] += 1
        if name == "aten::_local_scalar_dense":
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if name == "aten::nonzero":
            return args[0].new_empty(0, args[0].ndim, dtype=torch.long)
        result = func(*args, **(kwargs or {}))
        for X in _tensors([result]):
            if _real_device(X) == _META:
                self._hold(X.untyped_storage(), place)
        return result

    def _hold(self, storage: torch.UntypedStorage, place: str) -> None:
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = -(-storage.nbytes() // _PAGE) * _PAGE
        self._held_bytes += self._held[key]
        weakref.finalize(storage, self._free, key)
        if self._held_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_place = self._held_bytes, place

    def _free(self, key: int) -> None:
        self._held_bytes -= self._held.pop(key)


class _AsOnGpu(TorchFunctionMode):
    """Makes on "meta" what is asked for on "cuda", and says "cuda" where it is on "meta"."""

    def __init__(self, watch: FakeGpu) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == _DEVICE_OF:
            return _GPU if _real_device(args[0]) == _META else _real_device(args[0])
        if func is torch.Tensor.tolist:
            return _listed(args[0])
        moved = [_META if _is_gpu(value) else value for value in args]
        named = {key: _META if _is_gpu(value) else value for key, value in (kwargs or {}).items()}
        result = func(*moved, **named)
        if (func in _INDEXING and _real_device(args[0]) == _META and _has_list(args[1])) or (
            func in _OF_DATA and not isinstance(args[-1], torch.Tensor) and _real_device(result) == _META
        ):
            self._watch.crossings[_place()] += 1
        return result


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Compute on tensors without data in the body, as on a GPU with units for bfloat16."""
    watch = FakeGpu()
    rounding = mock.patch.object(bf16_matmul, "_is_faster", return_value=True)
    clocks = mock.patch.object(torch.cuda, "synchronize")  # clocks wait for the device, and there is none
    with torch.no_grad(), rounding, clocks, watch, _AsOnGpu(watch):
        yield watch


def _listed(X: torch.Tensor) -> object:
    return [_listed(x) for x in X] if X.ndim else X.item()


def _crosses(args: tuple[object, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy leads to another device than it comes from."""
    devices = {_real_device(X).type for X in _tensors(args)}
    return len(devices | ({torch.device(kwargs["device"]).type} if kwargs.get("device") else set())) > 1


def _has_list(index: object) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


def _real_device(X: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        return X.device


def _is_gpu(value: object) -> bool:
    return value == "cuda" or (isinstance(value, torch.device) and value.type == "cuda")


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among some values, and in the lists among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _place() -> str:
    """The innermost function of ours that runs."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_ROOT):
            return f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
