"""One half of symmetric matrices: what is computed of them, and what workers hand each other.

The half on and above the diagonal, and of the strips that it is cut into a little more. S is [..., C, C].
"""

import torch

__all__ = ["mirror_", "packed", "strips", "unpacked"]

_STRIP = {"cpu": 256, "cuda": 1024}
"""Columns. Narrow strips compute less that is thrown away, but a GPU wants wide ones. Part of the arithmetic: another
strip rounds differently."""
_PACKED_STRIP = 256


def strips(S: torch.Tensor) -> list[slice]:
    """The strips in which one half is worked on."""
    return _cut(S.shape[-1], _STRIP[S.device.type])


def mirror_(S: torch.Tensor) -> None:
    """Copy what is above the diagonal to below it."""
    for strip in strips(S):
        S[..., strip.stop :, strip] = S[..., strip, strip.stop :].mT


def packed(S: torch.Tensor) -> torch.Tensor:
    """The half on and above the diagonal, strip behind strip, [..., n]."""
    return torch.cat([S[..., s, s.start :].flatten(-2) for s in _cut(S.shape[-1], _PACKED_STRIP)], dim=-1)


def unpacked(P: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrices [..., C, C] of which one half was `packed`, C the size."""
    S = P.new_empty(*P.shape[:-1], size, size)
    start = 0
    for strip in _cut(size, _PACKED_STRIP):
        part = S[..., strip, strip.start :]
        part.copy_(P[..., start : start + part.shape[-2] * part.shape[-1]].view_as(part))
        start += part.shape[-2] * part.shape[-1]
    mirror_(S)
    return S


def _cut(size: int, strip: int) -> list[slice]:
    return [slice(start, min(start + strip, size)) for start in range(0, size, strip)]
