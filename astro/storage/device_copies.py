"""Copies between a device and the host that go on while the device computes.

On a GPU, copies have a stream of their own. The host's side of a copy is pinned memory, which torch allocates and keeps
for the next copy; it hands no buffer out again before the copies that use it are done. On the device's side, torch is
told which streams use a tensor (`record_stream`), so that its memory is not used again too early either.

On a CPU there is nothing to copy: tensors are returned as they are.
"""

from collections.abc import Mapping

import torch

__all__ = ["DeviceCopies", "OnDevice", "OnHost"]


class OnHost:
    """Tensors on their way to the host, or on the host already."""

    def __init__(self, tensors: dict[str, torch.Tensor], done: "torch.cuda.Event | None" = None) -> None:
        """Take note of a copy.

        Args:
            tensors: Tensors on the host by name, which the copy fills.
            done: Event behind the copy; None where nothing was copied.
        """
        self._tensors, self._done = tensors, done

    def wait(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name once all of them are there. Any thread may ask."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class OnDevice:
    """Tensors on their way to the device, or on the device already."""

    def __init__(self, tensors: dict[str, torch.Tensor], done: "torch.cuda.Event | None" = None) -> None:
        """Take note of a copy.

        Args:
            tensors: Tensors on the device by name, which the copy fills.
            done: Event behind the copy; None where nothing was copied.
        """
        self._tensors, self._done = tensors, done

    def wait(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, for the stream that is current here.

        The stream waits for them, the host does not.
        """
        if self._done is not None:
            stream = torch.cuda.current_stream(next(iter(self._tensors.values())).device)
            stream.wait_event(self._done)
            for tensor in self._tensors.values():
                # They were allocated for the stream of the copies, which knows nothing of what reads them here.
                tensor.record_stream(stream)
            self._done = None
        return self._tensors


class DeviceCopies:
    """Copies tensors to a device and from it, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        """Prepare copies; nothing is allocated.

        Args:
            device: Device that computes.
        """
        self._device = device
        # Each direction has a stream, because a GPU has an engine for each.
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None

    def to_host(self, tensors: Mapping[str, torch.Tensor]) -> OnHost:
        """Begin to copy tensors to the host, behind everything that the current stream has been given.

        Args:
            tensors: Tensors by name. Where they are on the host already, nobody may change them before the copy is
                done with.
        """
        here = {name: tensor.detach() for name, tensor in tensors.items()}
        if self._streams is None or not here:
            return OnHost({name: tensor.cpu() for name, tensor in here.items()})
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        stream = self._streams[0]
        copies = {}
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for name, tensor in here.items():
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        return OnHost(copies, done)

    def to_device(self, tensors: Mapping[str, torch.Tensor]) -> OnDevice:
        """Begin to copy tensors to the device.

        Args:
            tensors: Tensors on the host by name.
        """
        if self._streams is None or not tensors:
            return OnDevice({name: tensor.to(self._device) for name, tensor in tensors.items()})
        stream = self._streams[1]
        with torch.cuda.stream(stream):
            pinned = self.pinned(tensors)
            copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            done = torch.cuda.Event()
            done.record(stream)
        return OnDevice(copies, done)

    def pinned(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors of the host in pinned memory, from which copies to the device are several times as fast.

        Args:
            tensors: Tensors on the host by name. On a CPU they are returned as they are.
        """
        if self._streams is None:
            return dict(tensors)
        return {name: tensor if tensor.is_pinned() else tensor.pin_memory() for name, tensor in tensors.items()}
