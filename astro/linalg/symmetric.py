"""One half of symmetric matrices: what is computed of them, and what workers hand each other.

The half on and above the diagonal, and of the strips of rows that it is cut into what is left of the diagonal in their
own square. S is [..., C, C], of any float dtype.
"""

from collections.abc import Iterator, Sequence

import torch

from astro.linalg.batching import add_product_
from astro.linalg.tiling import every

__all__ = ["layer_error", "mirror_", "packed", "squared_error", "strips", "unpacked"]

_STRIP = {"cpu": 256, "cuda": 1024}
"""Narrow strips compute less that is thrown away, but a GPU wants wide ones. Part of the arithmetic: another strip
rounds differently."""
_PACKED_STRIP = 256
"""What is mirrored goes by this one on every device, as files do: so a matrix is the same to who wrote and who read it.
"""


def strips(S: torch.Tensor) -> list[slice]:
    """The strips in which one half of S is computed."""
    return every(S.shape[-1], _STRIP[S.device.type])


def mirror_(S: torch.Tensor) -> None:
    """Copy what is above the diagonal's squares to below them."""
    for strip in every(S.shape[-1], _PACKED_STRIP):
        S[..., strip.stop :, strip] = S[..., strip, strip.stop :].mT


def packed(S: torch.Tensor) -> torch.Tensor:
    """The half on and above the diagonal, strip behind strip, [..., n] with n a little more than C²/2."""
    parts = [S[..., strip, strip.start :] for strip in every(S.shape[-1], _PACKED_STRIP)]
    P = S.new_empty(*S.shape[:-2], sum(part.shape[-2] * part.shape[-1] for part in parts))
    for own, part in zip(_laid_out(P, parts), parts, strict=True):
        own.copy_(part)
    return P


def unpacked(P: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrices [..., C, C] of which one half was `packed` to P [..., n], C the size."""
    S = P.new_empty(*P.shape[:-1], size, size)
    parts = [S[..., strip, strip.start :] for strip in every(size, _PACKED_STRIP)]
    for own, part in zip(_laid_out(P, parts), parts, strict=True):
        part.copy_(own)
    mirror_(S)
    return S


def _laid_out(P: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Views of P for each part, in its shape."""
    start = 0
    for part in parts:
        size = part.shape[-2] * part.shape[-1]
        yield P[..., start : start + size].view_as(part)
        start += size


def layer_error(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row [B, R]: diag((W − Ŵ) H (W − Ŵ)ᵀ), float32, W and Ŵ [B, R, C], H [B, C, C]."""
    return squared_error(W - W_hat, H)


def squared_error(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """diag(E H Eᵀ), float32 [B, R] for E [B, R, C] and H [B, C, C].

    H is symmetric: what is below the squares on its diagonal counts twice, and what is above them not at all.
    """
    error = torch.zeros_like(E[..., 0])
    for strip in strips(H):
        own = E[..., strip]
        product = torch.matmul(E[..., strip.stop :], H[..., strip.stop :, strip]).mul_(2)
        add_product_(product, own, H[..., strip, strip])
        error += torch.linalg.vecdot(product, own)
    return error
