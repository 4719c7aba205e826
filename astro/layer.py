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

_ROW_TILE = 2048
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
    solved = quantization.method == "gptq"
    order = gptq.activation_order(H) if quantization.act_order == "static" else torch.arange(len(H), device=H.device)
    factor = factorize(H, order, quantization.damping, quantization.max_damping, name) if solved else None
    unit = regularizer.mean_group_maximum(W, group_size)
    regularized = regularization.name != "none" and regularization.beta > 0
    problem = regularizer.prepare(H, unit, regularization, group_size, name) if regularized else None

    integers, grids, maxima, error, energy = [], [], [], H.new_zeros(()), H.new_zeros(())
    for tile in torch.split(W, _ROW_TILE):
        target = regularizer.regularize(tile, problem) if problem else tile
        grid = fit_grid(target, quantization, scale_dtype)
        Q = gptq.solve(target, factor, grid) if factor else grid.quantize(target)
        maxima.append(regularizer.mean_group_maximum(target, group_size) * len(tile))
        error = error + layer_error(tile, grid.dequantize(Q), H).sum()
        energy = energy + layer_error(tile, torch.zeros_like(tile), H).sum()
        integers.append(Q)
        grids.append(grid)
    stacked = dataclasses.replace(
        grids[0], scale=torch.cat([g.scale for g in grids]), zero=torch.cat([g.zero for g in grids])
    )
    require_finite_scales(stacked, name)
    record = LayerRecord(
        name=name,
        bits=quantization.bits,
        rows=len(W),
        columns=W.shape[1],
        group_size=group_size,
        num_tokens=num_tokens,
        relative_error=float(error / energy.clamp(min=torch.finfo(torch.float32).tiny)),
        group_maximum_ratio=float(torch.stack(maxima).sum() / len(W) / unit) if unit > 0 else 1.0,
        damping=factor.damping if factor else 0.0,
        factorizations=factor.attempts if factor else 0,
    )
    if not record.relative_error < float("inf"):
        raise NumericalError(f"{name}: the layer error is {record.relative_error}; a weight or an input is not finite")
    return _unstack(weights, torch.cat(integers), stacked), record


def _unstack(weights: Sequence[tuple[str, torch.Tensor]], Q: torch.Tensor, grid: Grid) -> dict[str, QuantizedLinear]:
    members, start = {}, 0
    for name, weight in weights:
        rows = slice(start, start + len(weight))
        part = dataclasses.replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        members[name] = QuantizedLinear(Q[rows], part)
        start += len(weight)
    return members
