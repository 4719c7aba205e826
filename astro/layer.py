"""One group of linear layers with a common input: regularize, fit the grid, solve, measure.

Members (q, k, v; gate, up) are stacked along their rows: one Hessian, one factorization, one solve for all.
Shapes: R rows of all members together, C columns.
"""

import dataclasses
from collections.abc import Sequence

import torch

from astro import gptq, regularizer
from astro.config import Quantization, Regularizer
from astro.errors import NumericalError
from astro.grid import Grid, fit_grid, require_finite_scales
from astro.hessian import factorize, layer_error
from astro.report import LayerRecord

__all__ = ["QuantizedLinear", "quantize_group"]

_ROW_TILE = 1024
"""Rows that are worked on at once: bounds the memory of a solve. Part of the arithmetic."""


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer on its grid.

    Attributes:
        Q: integers, int8 [R, C].
        grid: scale and zero point of each group.
    """

    Q: torch.Tensor
    grid: Grid

    def dequantize(self) -> torch.Tensor:
        """The weights, float32 [R, C]."""
        return self.grid.dequantize(self.Q)


def quantize_group(
    weights: Sequence[tuple[str, torch.Tensor]],
    H: torch.Tensor,
    num_tokens: int,
    quantization: Quantization,
    regularization: Regularizer,
    scale_dtype: torch.dtype,
) -> tuple[dict[str, QuantizedLinear], LayerRecord]:
    """Quantize linear layers that read the same input.

    Args:
        weights: name and weight [R_m, C] of each member, any float dtype, on the device of H.
        H: mean of xxᵀ over the calibration tokens, float32 [C, C].
        num_tokens: tokens in H.
        quantization: grid and solver.
        regularization: what is done to the weights before.
        scale_dtype: dtype in which scales are stored.

    Returns:
        Each member on its grid by name, and the record of the group.

    Raises:
        NumericalError: H cannot be factored within the damping limit, or a result is not finite.
    """
    name = "+".join(member for member, _ in weights)
    W = torch.cat([weight.float() for _, weight in weights])
    group_size = quantization.columns_per_group(W.shape[1])
    target = _regularize(W, H, regularization, group_size, name)
    Q, grid, damping, attempts = _solve(target, H, quantization, scale_dtype, name)
    unit = regularizer.mean_group_maximum(W, group_size)
    record = LayerRecord(
        name=name,
        bits=quantization.bits,
        rows=len(W),
        columns=W.shape[1],
        group_size=group_size,
        num_tokens=num_tokens,
        relative_error=_relative_error(W, Q, grid, H),
        group_maximum_ratio=float(regularizer.mean_group_maximum(target, group_size) / unit) if unit > 0 else 1.0,
        damping=damping,
        factorizations=attempts,
    )
    if not record.relative_error < float("inf"):
        raise NumericalError(f"{name}: the layer error is {record.relative_error}; a weight or an input is not finite")
    return _unstack(weights, Q, grid), record


def _regularize(W: torch.Tensor, H: torch.Tensor, settings: Regularizer, group_size: int, name: str) -> torch.Tensor:
    """W̃ [R, C], tile by tile; W itself where nothing is to be done. Its [C, C] operator is gone afterwards."""
    if settings.name == "none" or settings.beta == 0:
        return W
    unit = regularizer.mean_group_maximum(W, group_size)
    problem = regularizer.prepare(H, unit, settings, group_size, name)
    target = torch.empty_like(W)
    for start in range(0, len(W), _ROW_TILE):
        rows = slice(start, start + _ROW_TILE)
        target[rows] = regularizer.regularize(W[rows], problem)
    return target


def _solve(
    target: torch.Tensor, H: torch.Tensor, settings: Quantization, scale_dtype: torch.dtype, name: str
) -> tuple[torch.Tensor, Grid, float, int]:
    """Integers and grid of a layer, the damping it took and the factorizations that were tried."""
    factor = None
    if settings.method == "gptq":
        in_order = torch.arange(len(H), device=H.device)
        order = gptq.activation_order(H) if settings.act_order == "static" else in_order
        factor = factorize(H, order, settings.damping, settings.max_damping, name)
    integers, grids = [], []
    for tile in torch.split(target, _ROW_TILE):
        grid = fit_grid(tile, settings, scale_dtype)
        integers.append(gptq.solve(tile, factor, grid) if factor else grid.quantize(tile))
        grids.append(grid)
    scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
    stacked = dataclasses.replace(grids[0], scale=scale, zero=zero)
    require_finite_scales(stacked, name)
    damping, attempts = (factor.damping, factor.attempts) if factor else (0.0, 0)
    return torch.cat(integers), stacked, damping, attempts


def _relative_error(W: torch.Tensor, Q: torch.Tensor, grid: Grid, H: torch.Tensor) -> float:
    """‖(Ŵ − W)X‖² / ‖WX‖² on the calibration tokens."""
    error, energy = H.new_zeros(()), H.new_zeros(())
    for start in range(0, len(W), _ROW_TILE):
        rows = slice(start, start + _ROW_TILE)
        tile = dataclasses.replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        error += layer_error(W[rows], tile.dequantize(Q[rows]), H).sum()
        energy += layer_error(W[rows], torch.zeros_like(W[rows]), H).sum()
    return float(error / energy.clamp(min=torch.finfo(torch.float32).tiny))


def _unstack(weights: Sequence[tuple[str, torch.Tensor]], Q: torch.Tensor, grid: Grid) -> dict[str, QuantizedLinear]:
    members, start = {}, 0
    for name, weight in weights:
        rows = slice(start, start + len(weight))
        part = dataclasses.replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        members[name] = QuantizedLinear(Q[rows], part)
        start += len(weight)
    return members
