"""The solve of some rows of linear layers with a common input: compensate, regularize, fit the grid, round, refine.

With what `prepared_groups` holds of an input group its rows are independent, so a tile of rows can be solved anywhere.
Input groups of one shape, like those of a layer's experts, are solved side by side.
Shapes: B input groups side by side, mostly 1; R rows of all members of an input group together, C columns.
"""

import dataclasses

import torch

from astro.linalg.symmetric import layer_error
from astro.quantization import gptq, regularizer
from astro.quantization.compensation import behind_errors, behind_rounding
from astro.quantization.grid import Grid, QuantizedLinear, fit_grid, grouped, require_finite_scales
from astro.quantization.output_error import output_error
from astro.quantization.prepared_groups import InputGroups
from astro.quantization.recipe import Figures, SolvedRows
from astro.quantization.refine import refine
from astro.quantization.sampled_rows import sample_rows
from astro.timing import timed

__all__ = ["measure_width", "quantize_rows", "solve_rows"]

_TINY = torch.finfo(torch.float32).tiny


def quantize_rows(input_groups: InputGroups, target: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    """Fit the grid to some rows and solve them, no more.

    Args:
        input_groups: The input groups, prepared from all rows.
        target: Weights of some rows of each, regularized where they are to be, float32 [B, R, C].

    Returns:
        The integers int8 [B, R, C] and their grid.

    Raises:
        NumericalError: A scale overflows the dtype in which it is stored.
    """
    with timed(input_groups.seconds, "grid", target.device):
        cost = input_groups.factor.cost if input_groups.factor else input_groups.H.diagonal(dim1=-2, dim2=-1)
        grid = fit_grid(target, input_groups.scheme, input_groups.recipe.solver, input_groups.recipe.scale_dtype, cost)
        require_finite_scales(grid, input_groups.names)
    if input_groups.factor is None:
        return grid.quantize(target), grid
    with timed(input_groups.seconds, "gptq", target.device):
        return gptq.solve(target, input_groups.factor, grid), grid


def solve_rows(input_groups: InputGroups, W: torch.Tensor) -> SolvedRows:
    """Regularize, quantize and refine some rows.

    Args:
        input_groups: The input groups, prepared from all rows, their β known.
        W: Original weights of some rows of each, float32 [B, R, C]. For errors see `output_error`.

    Raises:
        NumericalError: A scale overflows the dtype in which it is stored.
    """
    settings, seconds = input_groups.recipe.solver, input_groups.seconds
    intended = behind_errors(input_groups, W)
    target = W = behind_rounding(input_groups, intended)
    if input_groups.problem is not None:
        assert input_groups.beta is not None
        with timed(seconds, "regularize", W.device):
            target = regularizer.regularize(W, input_groups.problem, input_groups.beta.unsqueeze(-1))
    Q, grid = quantize_rows(input_groups, target)
    if input_groups.factor is not None and settings.refine_passes:
        with timed(seconds, "refine", W.device):
            damping = input_groups.factor.damping.float() * input_groups.H.diagonal(dim1=-2, dim2=-1).mean(-1)
            quantized = QuantizedLinear(Q, grid)
            refined, error = refine(W, quantized, input_groups.H, damping, settings, input_groups.recipe.scale_dtype)
            Q, grid = refined.Q, refined.grid
    else:
        error = layer_error(W, grid.dequantize(Q), input_groups.H)
    error, energy = output_error(input_groups.inputs, intended, QuantizedLinear(Q, grid), error)
    figures = Figures(
        error=error,
        energy=energy,
        maximum_before=grouped(W, grid.group_size).abs().amax(-1).mean(-1),
        maximum_after=grouped(target, grid.group_size).abs().amax(-1).mean(-1),
    )
    return SolvedRows(Q, grid, figures)


def measure_width(input_groups: InputGroups, W: torch.Tensor, bits: int) -> list[float]:
    """Measure the relative layer error of each input group at some width, on sampled rows.

    Nothing is regularized: the best β of one width is not that of another.

    Args:
        input_groups: The input groups, prepared with any width.
        W: Weights of all members of each, float32 [B, R, C].
        bits: The width.
    """
    scheme = dataclasses.replace(input_groups.scheme, bits=bits)
    measured = dataclasses.replace(input_groups, scheme=scheme, problem=None, seconds={})
    with timed(input_groups.seconds, "widths", W.device):
        figures = solve_rows(measured, sample_rows(W)).figures
    errors: list[float] = (figures.error.sum(-1) / figures.energy.sum(-1).clamp(min=_TINY)).tolist()
    return errors
