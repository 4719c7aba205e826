"""Symmetric matrices of which only one half is computed, stored and sent between workers.

The kept half is cut into strips of rows. Each strip holds what lies on and above the diagonal, and the rest of the
square that it has on the diagonal. S is [..., C, C] of any float dtype.
"""

from collections.abc import Iterator, Sequence

import torch

from astro.linalg.batching import add_product_
from astro.linalg.tiling import every

__all__ = ["layer_error", "mirror_", "packed", "squared_error", "strips", "unpacked"]

_STRIP = {"cpu": 256, "cuda": 1024}
"""Width of a strip by type of device. Narrow strips compute less that is thrown away, but a GPU wants wide ones. It is
a part of the arithmetic: another width rounds differently."""
_PACKED_STRIP = 256
"""Width of a strip where a matrix is packed or mirrored. It is equal on every device, so that the worker that reads a
matrix from a file has the same matrix as the worker that wrote it."""


def strips(S: torch.Tensor) -> list[slice]:
    """Return the strips in which one half of symmetric matrices is computed.

    Args:
        S: The matrices [..., C, C]; only their size and device matter.

    Returns:
        The columns of each strip, in order.
    """
    return every(S.shape[-1], _STRIP[S.device.type])


def mirror_(S: torch.Tensor) -> None:
    """Copy the elements above the squares on the diagonal to the places below them.

    Args:
        S: The matrices [..., C, C], which are completed in place.
    """
    for strip in every(S.shape[-1], _PACKED_STRIP):
        S[..., strip.stop :, strip] = S[..., strip, strip.stop :].mT


def packed(S: torch.Tensor) -> torch.Tensor:
    """Pack the half on and above the diagonal, one strip after another.

    Args:
        S: The symmetric matrices [..., C, C].

    Returns:
        The packed halves [..., n], where n is a little more than C²/2.
    """
    parts = [S[..., strip, strip.start :] for strip in every(S.shape[-1], _PACKED_STRIP)]
    P = S.new_empty(*S.shape[:-2], sum(part.shape[-2] * part.shape[-1] for part in parts))
    for view, part in zip(_laid_out(P, parts), parts, strict=True):
        view.copy_(part)
    return P


def unpacked(P: torch.Tensor, size: int) -> torch.Tensor:
    """Restore symmetric matrices from their packed halves.

    Args:
        P: The halves [..., n], as `packed` returns them.
        size: Number of columns C of a matrix.

    Returns:
        The whole matrices [..., C, C].
    """
    S = P.new_empty(*P.shape[:-1], size, size)
    parts = [S[..., strip, strip.start :] for strip in every(size, _PACKED_STRIP)]
    for view, part in zip(_laid_out(P, parts), parts, strict=True):
        part.copy_(view)
    mirror_(S)
    return S


def _laid_out(P: torch.Tensor, parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the view of P that belongs to each part, in the shape of the part."""
    start = 0
    for part in parts:
        size = part.shape[-2] * part.shape[-1]
        yield P[..., start : start + size].view_as(part)
        start += size


def layer_error(W: torch.Tensor, W_hat: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return the squared output error of each row, diag((W − Ŵ) H (W − Ŵ)ᵀ).

    Args:
        W: The weights W, float32 [B, R, C].
        W_hat: The quantized weights Ŵ, float32 [B, R, C].
        H: The Hessians, float32 [B, C, C].

    Returns:
        The errors, float32 [B, R].
    """
    return squared_error(W - W_hat, H)


def squared_error(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return diag(E H Eᵀ), the squared error of each row.

    H is symmetric: elements below the squares on its diagonal count twice, and those above them are not read.

    Args:
        E: The errors of the weights, float32 [B, R, C].
        H: The Hessians, float32 [B, C, C].

    Returns:
        The squared errors, float32 [B, R].
    """
    error = torch.zeros_like(E[..., 0])
    for strip in strips(H):
        here = E[..., strip]
        product = torch.matmul(E[..., strip.stop :], H[..., strip.stop :, strip]).mul_(2)
        add_product_(product, here, H[..., strip, strip])
        error += torch.linalg.vecdot(product, here)
    return error
