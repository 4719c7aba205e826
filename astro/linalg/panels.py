"""Columns that are settled one after the other, where each one changes what the columns after it want.

GPTQ and its refinement are both this loop. They differ in what settling a column means, a function of theirs that is
called the step here. With t_j what column j wants, m_i what the step made of column i, and M the couplings of columns,

    t_j ← t_j + M_ij m_i      for every column j after i.

Within a panel of a few columns this goes column by column, and from a panel to the columns after it by one matrix
product. The loop over columns is written once, in `_settle_`. It runs in place on views of the work arrays, which are
kept because the calls are what takes time where rows are few. Where the thread compiles it runs on columns of their
own, as a chain of values of which a compiler makes one kernel for each panel.
Shapes: B layers side by side, P columns, R rows; arrays are transposed [B, P, R], so that a column is contiguous, and a
column alone is still an array, [B, 1, R].
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from astro.linalg import compiled
from astro.linalg.batching import add_product_
from astro.linalg.tiling import every

__all__ = ["Panels", "settle_apart"]

_PANEL = 16
"""Columns of the innermost loop, where each column is updated by those before it in the panel."""

ColumnsT = TypeVar("ColumnsT", bound=tuple[torch.Tensor, ...])
"""The arrays of some columns, or of a single one: a NamedTuple of which the first, T, is what the columns want."""
Step = Callable[[ColumnsT], torch.Tensor]
"""Settles a column [B, 1, R] in place, and returns what later columns take of it."""


class _Later(NamedTuple):
    """Some columns after a settled one: what they want [B, L, R], and their couplings with it [B, L, 1]."""

    T: torch.Tensor
    couplings: torch.Tensor


class Panels(Generic[ColumnsT]):
    """A block of columns that are settled together, with views of every column.

    Attributes:
        arrays: The arrays of the block, [B, P, R]. Who fills them reads the results from them.
        M: The couplings of its columns, [B, P, P], of which the part above the diagonal is used.
        size: The number of its columns, P.
    """

    def __init__(
        self,
        arrays: ColumnsT,
        results: Sequence[torch.Tensor],
        step: Step[ColumnsT],
        compiled_panel: Callable[..., tuple[torch.Tensor, ...]],
    ) -> None:
        """Make the views.

        Args:
            arrays: The arrays of the block, [B, P, R].
            results: Those of them that hold results in the end, first the one that `step` returns columns of.
            step: Settles one column.
            compiled_panel: Takes M and the arrays of one panel and returns its results: see `settle_apart`.
        """
        T = arrays[0]
        self.arrays, self.size = arrays, T.shape[-2]
        self.M = T.new_empty(*T.shape[:-2], self.size, self.size)
        self._results, self._step, self._compiled_panel = results, step, compiled_panel
        self._panels = every(self.size, _PANEL)
        self._columns = _columns(arrays)
        self._later = _later(T, self.M, self._panels)

    def settle_(self) -> None:
        """Settle all columns of the block, one after the other."""
        compiled_results = []
        for panel in self._panels:
            if compiled.is_enabled():
                inputs = (X[..., panel, :] for X in self.arrays)
                compiled_results.append(self._compiled_panel(self.M[..., panel, panel], *inputs))
                moves = compiled_results[-1][0]
            else:
                _settle_(self._columns[panel], self._later[panel], self._step)
                moves = self._results[0][..., panel, :]
            if panel.stop < self.size:
                later = self.arrays[0][..., panel.stop :, :]
                add_product_(later, self.M[..., panel, panel.stop :].mT, moves)
        for X, of_panels in zip(self._results, zip(*compiled_results, strict=True), strict=False):
            torch.cat(of_panels, -2, out=X)


def settle_apart(arrays: ColumnsT, M: torch.Tensor, step: Step[ColumnsT]) -> list[ColumnsT]:
    """Settle the columns of a panel without any effect on the arrays, for a compiler.

    Args:
        arrays: The arrays of the panel, [B, P, R].
        M: The couplings of its columns, [B, P, P].
        step: Settles one column.

    Returns:
        Each column after it was settled.
    """
    columns = [type(column)(*(x.clone() for x in column)) for column in _columns(arrays)]
    size = len(columns)
    later = [[_Later(columns[j][0], M[..., i, j, None, None]) for j in range(i + 1, size)] for i in range(size)]
    _settle_(columns, later, step)
    return columns


def _settle_(columns: Sequence[ColumnsT], later: Sequence[Sequence[_Later]], step: Step[ColumnsT]) -> None:
    """The recurrence: settle each column, and let those after it take their part of the move."""
    for column, behind in zip(columns, later, strict=True):
        move = step(column)
        for T, couplings in behind:
            T.addcmul_(couplings, move)


def _columns(arrays: ColumnsT) -> list[ColumnsT]:
    """Views of each column of the arrays, [B, 1, R]."""
    make = type(arrays)._make  # type: ignore[attr-defined]
    return [make(views) for views in zip(*(X.split(1, -2) for X in arrays), strict=True)]


def _later(T: torch.Tensor, M: torch.Tensor, panels: Sequence[slice]) -> list[list[_Later]]:
    """For each column the columns between it and the end of its panel, as one view, if there are any."""
    couplings = M.mT.split(1, -1)
    later: list[list[_Later]] = []
    for panel in panels:
        for i in range(panel.start, panel.stop - 1):
            rest = (-2, i + 1, panel.stop - i - 1)
            later.append([_Later(T.narrow(*rest), couplings[i].narrow(*rest))])
        later.append([])
    return later
