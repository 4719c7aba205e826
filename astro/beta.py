"""The search of β: sampled rows get just what all rows will get, under every candidate, and the errors decide.

Rows are independent, so that candidates can be tried on a tile of the sample anywhere. Shapes: R rows of all members
together, C columns, S sampled rows, K candidates.
"""

import dataclasses

import torch

from astro import regularizer
from astro.group import LinearGroup, compensate, num_sampled, sampled, solve_rows
from astro.report import timed
from astro.tiling import row_tiles

__all__ = ["NUM_CANDIDATES", "choose", "sample_tiles", "search", "weigh"]

_BETAS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
"""Strengths that are tried beside 0, relative to the mean group maximum."""
NUM_CANDIDATES = 1 + len(_BETAS)
_LEAST_GAIN = 2e-3
"""Share of the layer error that a β must save on the sample, beyond one standard error, to be used."""


def sample_tiles(num_rows: int, num_columns: int, device_type: str) -> list[slice]:
    """The tiles of a group's sampled rows, each of which is solved under all candidates at once."""
    return row_tiles(num_sampled(num_rows), num_columns, device_type, copies=NUM_CANDIDATES)


def weigh(group: LinearGroup, W: torch.Tensor, tile: slice) -> torch.Tensor:
    """The layer error of some sampled rows under every candidate, 0 first.

    Args:
        group: prepared from all rows, β open.
        W: weights of all members, float32 [R, C].
        tile: of the sampled rows.

    Returns:
        ‖(ŵ − w)X‖², float32 [K, rows of the tile].
    """
    assert group.problem is not None
    rows = compensate(group, sampled(W)[tile])
    # Its own clock: what the search spends on grids, GPTQ and refinement is the search's.
    own = dataclasses.replace(group, seconds={}, drift=None)
    with timed(group.seconds, "beta"):
        targets = [rows, *(regularizer.regularize(rows, group.problem, beta) for beta in _BETAS)]
        # All candidates are quantized in one solve, as rows over each other.
        solved = solve_rows(own, rows.repeat(NUM_CANDIDATES, 1), torch.cat(targets))
    return solved.figures.error.reshape(NUM_CANDIDATES, -1)


def choose(group: LinearGroup, errors: torch.Tensor) -> LinearGroup:
    """The group with the β that surely saves most of the sampled rows' error; with 0 where none does.

    Args:
        group: prepared from all rows, β open.
        errors: of all sampled rows under every candidate, in their order, float32 [K, S].
    """
    plain = errors[0].sum().clamp(min=torch.finfo(torch.float32).tiny)
    saved = errors[0] - errors[1:]
    gains = saved.sum(1) / plain
    # The sample's own noise is taken off, so that a β is not chosen for a few lucky rows.
    sure = gains - saved.std(1, correction=0) * errors.shape[1] ** 0.5 / plain
    best = int(sure.argmax())
    if float(sure[best]) < _LEAST_GAIN:
        return dataclasses.replace(group, beta=0.0, problem=None)
    return dataclasses.replace(group, beta=_BETAS[best], beta_gain=float(gains[best]))


def search(group: LinearGroup, W: torch.Tensor) -> LinearGroup:
    """The group with its β, all tiles of the sample weighed here.

    Args:
        group: prepared from all rows, β open.
        W: weights of all members, float32 [R, C].
    """
    tiles = sample_tiles(len(W), W.shape[1], W.device.type)
    return choose(group, torch.cat([weigh(group, W, tile) for tile in tiles], dim=1))
