"""Slices of encoded weights, decoded on the device that computes, and returned on the host."""

import dataclasses

import torch

from astro.storage.encoded_tensor import EncodedTensor, Slice

__all__ = ["SliceDecoder"]


class SliceDecoder:
    """Decodes on a device, on a stream of its own: it neither waits for what the device is at work on, nor stops it.

    A thread of a CPU decodes some hundred million weights a second, and a block of a mixture of experts has ten
    billion. The values are the same bits on every device: they are products of two numbers, each rounded once.
    """

    def __init__(self, device: torch.device) -> None:
        """Prepare the stream; nothing is allocated.

        Args:
            device: Device that decodes.
        """
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(self, entry: EncodedTensor, part: Slice) -> torch.Tensor:
        """Return a slice of a weight on the host, in the weight's dtype.

        Args:
            entry: The weight.
            part: The slice, whose memory on the host is filled.
        """
        if self._stream is None:
            return entry.decode(part)
        with torch.cuda.stream(self._stream):
            moved = {role: tensor.to(self._device) for role, tensor in part.parts.items()}
            return entry.decode(dataclasses.replace(part, parts=moved)).cpu()
