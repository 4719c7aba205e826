"""The search of β: sampled rows are regularized and solved under every candidate, and the errors decide.

They get what all rows will get but for the refinement: it is half of the work, and the choices without it are no worse
(measured at 2, 3 and 4 bits). Rows are independent, so that candidates can be tried on a tile of the sample anywhere.
Shapes: R rows of all members together, C columns, S sampled rows, K candidates, B input groups side by side, each of
which gets its β.
"""

import dataclasses

import torch

from astro.linalg.symmetric import layer_error
from astro.linalg.tiling import row_tiles
from astro.quantization import regularizer
from astro.quantization.compensation import compensate
from astro.quantization.prepared_groups import InputGroups
from astro.quantization.row_solver import quantize_rows
from astro.quantization.sampled_rows import num_sample_rows, sample_rows
from astro.timing import timed

__all__ = ["NUM_CANDIDATES", "choose", "sample_tiles", "search", "try_betas"]

_BETAS = (3e-5, 1e-4, 3e-4, 1e-3)
"""Strengths that are tried beside 0, relative to the mean group maximum."""
NUM_CANDIDATES = 1 + len(_BETAS)
"""Number of strengths that are tried, 0 among them."""
_LEAST_GAIN = 2e-3
"""Share of the layer error that a β must save on the sample, beyond one standard error, to be used."""


def sample_tiles(num_rows: int, num_columns: int, tile_elements: int, num_input_groups: int = 1) -> list[slice]:
    """Cut the sampled rows of input groups side by side into tiles, each solved under all candidates at once.

    Args:
        num_rows: Rows of all members of an input group together.
        num_columns: Number of their inputs.
        tile_elements: Weights of a tile.
        num_input_groups: Number of input groups side by side.
    """
    return row_tiles(num_sample_rows(num_rows), num_columns, tile_elements, copies=num_input_groups * NUM_CANDIDATES)


def try_betas(input_groups: InputGroups, W: torch.Tensor, tile: slice) -> torch.Tensor:
    """Measure the layer error of some sampled rows under every candidate, 0 first.

    Args:
        input_groups: The input groups, prepared from all rows, their β open.
        W: Weights of all members of each, float32 [B, R, C].
        tile: The tile of the sampled rows.

    Returns:
        The errors ‖(ŵ − w)X‖², float32 [B, K, rows of the tile].
    """
    assert input_groups.problem is not None
    rows = compensate(input_groups, sample_rows(W)[:, tile])
    # With another clock: what the search spends on grids and GPTQ is the search's.
    timed_apart = dataclasses.replace(input_groups, seconds={})
    with timed(input_groups.seconds, "beta", W.device):
        # All candidates are regularized and quantized as rows over each other.
        copies = rows.repeat(1, NUM_CANDIDATES, 1)
        betas = torch.tensor(_BETAS, device=rows.device).repeat_interleave(rows.shape[1]).unsqueeze(0)
        regularized = regularizer.regularize(copies[:, rows.shape[1] :], input_groups.problem, betas)
        Q, grid = quantize_rows(timed_apart, torch.cat([rows, regularized], dim=1))
        error = layer_error(copies, grid.dequantize(Q), input_groups.H)
    return error.reshape(len(error), NUM_CANDIDATES, -1)


def choose(input_groups: InputGroups, errors: torch.Tensor) -> InputGroups:
    """Settle on the β that surely saves most of the sampled rows' error; on 0 where none does.

    Args:
        input_groups: The input groups, prepared from all rows, their β open.
        errors: Errors of all sampled rows under every candidate, in their order, float32 [B, K, S].
    """
    plain = errors[:, :1].sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    saved = errors[:, :1] - errors[:, 1:]
    gains = saved.sum(-1) / plain
    # The sample's own noise is taken off, so that a β is not chosen for a few lucky rows.
    sure = gains - saved.std(-1, correction=0) * errors.shape[-1] ** 0.5 / plain
    best = sure.argmax(-1, keepdim=True)
    is_gain = (sure.gather(-1, best) >= _LEAST_GAIN) & ~input_groups.lacks_statistics.unsqueeze(-1)
    candidates = torch.tensor(_BETAS, dtype=torch.float64, device=errors.device)
    beta = torch.where(is_gain, candidates[best], 0.0).squeeze(-1)
    gain = torch.where(is_gain, gains.gather(-1, best), 0.0).double().squeeze(-1)
    problem = input_groups.problem if bool(is_gain.any()) else None
    return dataclasses.replace(input_groups, beta=beta, beta_gain=gain, problem=problem)


def search(input_groups: InputGroups, W: torch.Tensor) -> InputGroups:
    """Try every β on all tiles of the sample, and settle on one.

    Args:
        input_groups: The input groups, prepared from all rows, their β open.
        W: Weights of all members of each, float32 [B, R, C].
    """
    tiles = sample_tiles(W.shape[1], W.shape[2], input_groups.recipe.tile_elements_on(W.device), len(W))
    return choose(input_groups, torch.cat([try_betas(input_groups, W, tile) for tile in tiles], dim=-1))
