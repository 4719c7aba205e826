"""Input groups, linear layers with a common input: stack, solve tile by tile, cut apart, record.

Members (q, k, v; gate, up) are stacked along their rows: one Hessian, one factorization, one solve for all. Input
groups of one shape, like those of a layer's experts, lie side by side.
Shapes: B input groups, R rows of all members of one together, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from astro.config import LayerScheme
from astro.errors import NumericalError
from astro.linalg.batching import stacked
from astro.linalg.tiling import row_tiles
from astro.quantization import beta_search
from astro.quantization.compensation import USUAL_SHARE, reproducible_share
from astro.quantization.corrections import correct_input_groups, with_corrections
from astro.quantization.grid import Grid, QuantizedLinear
from astro.quantization.held_columns import HeldColumns
from astro.quantization.layer_record import LayerRecord
from astro.quantization.prepared_groups import InputGroups, factor_input_groups, with_regularizer
from astro.quantization.recipe import InputGroupOutcome, InputMoments, Recipe, SolvedRows
from astro.quantization.row_solver import measure_width, solve_rows

__all__ = ["merge_rows", "quantize_input_groups", "stack"]

_FIGURES = ("error", "energy", "maximum_before", "maximum_after")


def stack(input_groups: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Lay the weights of each input group's members over each other, and input groups of one shape side by side.

    Args:
        input_groups: Weights [R_m, C] of the members of each, any float dtype.

    Returns:
        The weights, float32 [B, R, C].
    """
    return stacked([torch.cat([weight.float() for weight in members]) for members in input_groups])


def quantize_input_groups(
    input_groups: Sequence[Mapping[str, torch.Tensor]],
    inputs: InputMoments,
    num_tokens: Sequence[int],
    scheme: LayerScheme,
    recipe: Recipe,
    widths: Sequence[int] = (),
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Quantize input groups of one shape.

    Args:
        input_groups: Weight [R_m, C] of each member of each by name, any float dtype, on the device of H.
        inputs: What calibration learned of their inputs. Nothing is regularized where statistics are lacking.
        num_tokens: Number of tokens in each H.
        scheme: The grid of all members.
        recipe: How they are quantized.
        widths: Widths that are measured besides, on sampled rows.

    Returns:
        Each member on its grid by name, and the record of each input group.

    Raises:
        NumericalError: H cannot be factored within the damping limit, or a result is not finite.
    """
    W = stack([list(members.values()) for members in input_groups])
    names = ["+".join(members) for members in input_groups]
    held = HeldColumns.taken_from_(W, [list(members) for members in input_groups], recipe)
    prepared = _prepare(names, W, inputs, scheme, recipe, held)
    if prepared.beta is None:
        prepared = beta_search.search(prepared, W)
    tiles = row_tiles(W.shape[1], W.shape[2], recipe.tile_elements_on(W.device), copies=len(W))
    solved = [solve_rows(prepared, W[:, rows]) for rows in tiles]
    errors = {bits: measure_width(prepared, W, bits) for bits in widths}
    rows = [[(name, len(weight)) for name, weight in members.items()] for members in input_groups]
    members, records = merge_rows(rows, solved, prepared.outcomes_(), num_tokens)
    del solved  # as large as the members
    made_up_for = [0.0] * len(records) if prepared.drift is None else prepared.share.tolist()
    for i, record in enumerate(records):
        of_widths = {bits: errors[bits][i] for bits in widths}
        records[i] = replace(record, width_errors=of_widths, compensation=made_up_for[i])
    prepared = replace(prepared, problem=None)  # as large as H, and corrections need none
    with held.put_back(W):
        corrected = correct_input_groups(prepared, W, rows, members)
    return with_corrections(members, records, corrected)


def _prepare(
    names: Sequence[str],
    W: torch.Tensor,
    inputs: InputMoments,
    scheme: LayerScheme,
    recipe: Recipe,
    held: HeldColumns,
) -> InputGroups:
    """Compute what all rows share, and the share of earlier errors that weights make up for where it is measured."""
    prepared = factor_input_groups(names, inputs, scheme, recipe)
    if prepared.drift is not None and recipe.solver.compensation == "auto":
        share = torch.full_like(prepared.share, USUAL_SHARE)
        if inputs.spread is not None:
            with held.put_back(W):
                share = reproducible_share(prepared, W, inputs.spread.to(W.device))
        prepared = replace(prepared, inputs=replace(prepared.inputs, spread=None), share=share)
    return with_regularizer(prepared, W)


def merge_rows(
    input_groups: Sequence[Sequence[tuple[str, int]]],
    solved: Sequence[SolvedRows],
    outcomes: Sequence[InputGroupOutcome],
    num_tokens: Sequence[int],
) -> tuple[dict[str, QuantizedLinear], list[LayerRecord]]:
    """Put the members and records of input groups together from their solved tiles.

    Args:
        input_groups: Name and number of rows of each member of each.
        solved: Every tile of the input groups, in order.
        outcomes: What was decided for each input group.
        num_tokens: Number of tokens in the Hessian of each.

    Raises:
        NumericalError: The layer error is not finite.
    """
    grids = [rows.grid for rows in solved]
    scale, zero = torch.cat([grid.scale for grid in grids], dim=1), torch.cat([grid.zero for grid in grids], dim=1)
    Q = torch.cat([rows.Q for rows in solved], dim=1)
    totals = sum(torch.stack([getattr(rows.figures, figure).sum(-1) for figure in _FIGURES]) for rows in solved)
    assert isinstance(totals, torch.Tensor)
    quantized: dict[str, QuantizedLinear] = {}
    records = []
    for i, (members, figures) in enumerate(zip(input_groups, totals.T.tolist(), strict=True)):
        grid = replace(grids[0], scale=scale[i], zero=zero[i])
        quantized |= _unstack(members, Q[i], grid)
        name = "+".join(member for member, _ in members)
        records.append(_record(name, QuantizedLinear(Q[i], grid), figures, outcomes[i], num_tokens[i]))
    return quantized, records


def _record(
    name: str, solved: QuantizedLinear, figures: Sequence[float], outcome: InputGroupOutcome, num_tokens: int
) -> LayerRecord:
    error, energy, before, after = figures
    if not error < float("inf"):
        raise NumericalError(f"{name}: the layer error is {error}; a weight or an input is not finite")
    return LayerRecord(
        name=name,
        bits=solved.grid.bits,
        rows=solved.Q.shape[0],
        columns=solved.Q.shape[1],
        group_size=solved.grid.group_size,
        num_tokens=num_tokens,
        routed_tokens=num_tokens,
        fallback="",
        relative_error=error / max(energy, torch.finfo(torch.float32).tiny),
        output_energy=energy,
        beta=outcome.beta,
        beta_gain=outcome.beta_gain,
        width_errors={},
        group_maximum_ratio=after / before if before > 0 else 1.0,
        damping=outcome.damping,
        factorizations=outcome.factorizations,
        seconds=outcome.seconds,
    )


def _unstack(members: Sequence[tuple[str, int]], Q: torch.Tensor, grid: Grid) -> dict[str, QuantizedLinear]:
    apart, start = {}, 0
    for name, count in members:
        rows = slice(start, start + count)
        part = replace(grid, scale=grid.scale[rows], zero=grid.zero[rows])
        apart[name] = QuantizedLinear(Q[rows], part)
        start += count
    return apart
