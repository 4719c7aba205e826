"""Operations that the solve of a block's layers takes, counted from shapes and settings alone.

Layers are solved in batches, each of input groups of one shape side by side. The rows of a batch are solved in tiles.
"""

from astro.config import PER_CHANNEL, Quantization, Regularizer
from astro.linalg.compiled import ColumnLoops
from astro.linalg.tiling import row_tiles
from astro.quantization.beta_search import NUM_CANDIDATES, sample_tiles
from astro.quantization.grid import num_candidates
from astro.quantization.regularizer import PROX_PASSES
from astro.quantization.sampled_rows import num_sample_rows
from astro_dist.planning.predicted_groups import PredictedInputGroup
from astro_dist.planning.work import Work

__all__ = ["SolveCost", "dequantizing", "packing", "unpacking"]

_CANDIDATE_PASSES = 4
"""Elementwise operations for each candidate of a scale: divide, round, limit and weigh, as `grid._group_error` does
them. Each element is read or written four times beside the sums. They are counted at the speed of the proximal map's
passes."""
_COLUMN_STEPS = {"plain": (5.5, 4.0), "compiled": (0.5, 0.6), "kernels": (0.2, 0.1)}
"""Small dependent operations for a column in GPTQ, and in a pass of refinement, by how the innermost loops run.

- plain: five calls of GPTQ (divide, round, limit, the error, what later columns take of it) and three of refinement
  (round, limit, what later columns take of it), and half a call and one more for what a block of columns takes besides.
- compiled: 16 columns are a kernel or two: 0.27 and 0.51 launches, counted.
- kernels: 128 columns are a kernel: 0.02 and 0.05 launches, counted. Its 8,128 multiplications and additions follow
  each other, 4 clocks each, and so it takes as long as some five launches: 0.04 a column.

To each is added, in round numbers, what a solve launches besides (`tests/bench/launches.py`)."""

_PACK_PASSES, _UNPACK_PASSES, _DEQUANTIZE_PASSES = 2, 2, 2
"""Elementwise operations on each weight when it is packed, unpacked, and turned into a float, at the speed of the
proximal map's passes. A CPU takes 1.8 to 2.1 for each (4 bits, one thread). On a GPU what is read and written counts, 8
bytes a pass: 12, 13 and 19 bytes."""


_MAKING_UP, _SAMPLED_OUTPUTS = 4, 4
"""Half products of rows with a matrix of columns × columns where inputs are rounded: where weights make up for that,
with the drift and with both halves of the factor; and the outputs of sampled tokens, on which the error is measured, as
many at most."""


def packing(num_weights: float) -> Work:
    """Count what it takes to pack weights for their file."""
    return Work(elements=_PACK_PASSES * num_weights)


def dequantizing(num_weights: float) -> Work:
    """Count what it takes to turn integers into weights."""
    return Work(elements=_DEQUANTIZE_PASSES * num_weights)


def unpacking(num_weights: float) -> Work:
    """Count what it takes to make weights of what their file holds."""
    return Work(elements=_UNPACK_PASSES * num_weights) + dequantizing(num_weights)


class SolveCost:
    """Counts what the solve of a batch takes."""

    def __init__(
        self,
        quantization: Quantization,
        regularization: Regularizer,
        tile_elements: int,
        loops: ColumnLoops,
        is_rounded: bool = False,
        makes_up_for_rounding: bool = False,
    ) -> None:
        """Look at the settings of a run.

        Args:
            quantization: Grids and solver.
            regularization: What is done to the weights before they are rounded.
            tile_elements: Weights of a tile.
            loops: How the innermost loops run.
            is_rounded: Whether inputs are rounded.
            makes_up_for_rounding: Whether weights make up for that.
        """
        self._is_rounded = is_rounded
        self._makes_up_for_rounding = makes_up_for_rounding
        self._quantization, self._regularization = quantization, regularization
        self._tile_elements = tile_elements
        self._column_steps = _COLUMN_STEPS[loops]

    def tiles(self, batch: PredictedInputGroup) -> list[slice]:
        """Return the tiles of all rows."""
        return row_tiles(batch.rows, batch.columns, self._tile_elements, copies=batch.count)

    def sample_tiles(self, batch: PredictedInputGroup) -> list[slice]:
        """Return the tiles of the sampled rows; none where β is not searched."""
        tiles = sample_tiles(batch.rows, batch.columns, self._tile_elements, batch.count)
        return tiles if self._regularization.is_searched else []

    def whole(self, batch: PredictedInputGroup, round_index: int) -> Work:
        """Count all of a batch, solved by one worker.

        Args:
            batch: The batch.
            round_index: Index of the round.
        """
        searched = self.try_betas(batch, self.sample_tiles(batch))
        all_rows = self.solve_rows(batch, self.tiles(batch))
        return self.prepare(batch) + searched + all_rows + self.measure_widths(batch, round_index)

    def prepare(self, batch: PredictedInputGroup) -> Work:
        """Count what all rows share: the Cholesky factor of GPTQ, C³/3 operations, and the inverse of ADMM, C³."""
        inverted = bool(self._iterations) and self._regularization.solver == "admm"
        return Work(exact=(self._is_factored / 3.0 + inverted) * batch.square * batch.columns)

    def measure_widths(self, batch: PredictedInputGroup, round_index: int) -> Work:
        """Count what a width budget takes in its first round: sampled rows are solved once for each width.

        Args:
            batch: The batch.
            round_index: Index of the round.
        """
        if self._quantization.bits != "auto" or round_index:
            return Work()
        rows = [slice(0, num_sample_rows(batch.rows))]
        each = self._solve_rows(batch, rows, iterations=0)
        return sum([each] * len(self._quantization.bit_choices), Work())

    def try_betas(self, batch: PredictedInputGroup, tiles: list[slice]) -> Work:
        """Count regularization, GPTQ and errors of sampled rows under every candidate of β.

        Args:
            batch: The batch.
            tiles: Tiles of the sampled rows.
        """
        return self._quantize(batch, tiles, self._iterations, NUM_CANDIDATES, products=0.5, passes=0)

    def solve_rows(self, batch: PredictedInputGroup, tiles: list[slice]) -> Work:
        """Count regularization, GPTQ, refinement and figures of some rows.

        Args:
            batch: The batch.
            tiles: Tiles of the rows.
        """
        return self._solve_rows(batch, tiles, self._iterations)

    @property
    def _iterations(self) -> int:
        """Iterations of the regularizer; 0 where nothing is regularized."""
        regularization = self._regularization
        return 0 if regularization.name == "none" or regularization.beta == 0 else regularization.steps

    @property
    def _is_factored(self) -> bool:
        return self._quantization.method == "gptq"

    def _solve_rows(self, batch: PredictedInputGroup, tiles: list[slice], iterations: int) -> Work:
        settings = self._quantization
        passes = settings.refine_passes if self._is_factored else 0
        # A pass takes a product span by span, and of a wide group within it half of one, and one for its scale.
        size = batch.columns if settings.group_size == PER_CHANNEL else settings.group_size
        wider = 1.5 * size / batch.columns
        # Of figures half a product is what a result is compared with, where it was refined half of another one.
        products = 1 + 0.5 * bool(passes) + passes * wider
        products += 0.5 * (self._makes_up_for_rounding * _MAKING_UP + self._is_rounded * _SAMPLED_OUTPUTS)
        solved = self._quantize(batch, tiles, iterations, 1, products, passes)
        return solved + Work(rounded=passes * 2.0 * batch.columns * _num_elements(batch, tiles))

    def _quantize(
        self, batch: PredictedInputGroup, tiles: list[slice], iterations: int, copies: int, products: float, passes: int
    ) -> Work:
        """Count what tiles take that hold so many copies of each row.

        They are regularized by so many iterations and put on their grids. Besides, there are products with H, as many
        as `products` says, and passes of refinement over the columns.
        """
        solving, refining = self._column_steps
        elements = copies * _num_elements(batch, tiles)
        elementwise = (
            iterations * PROX_PASSES
            + num_candidates(self._quantization.symmetric, self._quantization) * _CANDIDATE_PASSES
        )
        product = 2.0 * batch.columns * elements
        published = self._regularization.solver == "pgd"
        # The first iteration of ADMM takes no product.
        regularized = Work(exact=iterations * product) if published else Work(rounded=max(iterations - 1, 0) * product)
        return regularized + Work(
            # GPTQ multiplies the errors with one half of its factor; rounding to nearest has neither.
            exact=(0.5 * self._is_factored + products) * product,
            elements=elementwise * elements,
            steps=len(tiles) * batch.columns * (solving * self._is_factored + passes * refining),
        )


def _num_elements(batch: PredictedInputGroup, tiles: list[slice]) -> float:
    return float(batch.count * sum(tile.stop - tile.start for tile in tiles) * batch.columns)
