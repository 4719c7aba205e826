"""How rows are solved, from what, and what comes of it.

Shapes: B input groups side by side, mostly 1; R rows of all members of an input group together, C columns.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from astro.activation_config import Reconstruction
from astro.calibration.input_sums import RoundingMoments
from astro.config import Regularizer, SolverSettings
from astro.linalg.tiling import TILE_ELEMENTS
from astro.quantization.grid import Grid

__all__ = ["Corrections", "Figures", "InputGroupOutcome", "InputMoments", "Recipe", "SolvedRows"]


@dataclasses.dataclass(frozen=True)
class Corrections:
    """Which layers of a block get a correction of low rank, and of which kind.

    Attributes:
        settings: Rank of the corrections.
        layers: Names of the layers that get one.
        dtype: Dtype in which the factors are stored.
        wants_rounded: Whether the outputs that are wanted are those of rounded inputs, for which weights were trained;
            otherwise those of inputs as they are.
        columns: Columns that corrections hold alone, by the name of the layer, see `held_columns`. All layers that read
            one input have the same, and each of them gets a correction.
    """

    settings: Reconstruction
    layers: frozenset[str]
    dtype: torch.dtype
    wants_rounded: bool = False
    columns: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How layers are quantized, apart from their grids: the same for all layers of a block.

    Attributes:
        solver: How weights are put on their grid.
        regularizer: What is done to the weights before.
        scale_dtype: Dtype in which scales are stored.
        tile_elements: Weights of a tile; None stands for the usual number of the device.
        corrections: Corrections of the errors that are left; None for none.
    """

    solver: SolverSettings
    regularizer: Regularizer
    scale_dtype: torch.dtype
    tile_elements: int | None = None
    corrections: Corrections | None = None

    def tile_elements_on(self, device: torch.device) -> int:
        """Return the number of weights that are solved at once.

        Args:
            device: Device that solves them.
        """
        return TILE_ELEMENTS[device.type] if self.tile_elements is None else self.tile_elements


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """What calibration learned of the inputs of input groups side by side.

    Attributes:
        H: Weighted mean of x̂x̂ᵀ over the calibration tokens, float32 [B, C, C]. x̂ are the inputs x as a server rounds
            them, or x itself where inputs stay as they are.
        drift: Weighted mean of (x_s − x)x̂ᵀ, x_s the same tokens' inputs in the source model, float32 [B, C, C]; None
            where errors made before are not made up for.
        lacks_statistics: Which input groups have no statistics, their H being the identity; where it is empty, none.
        rounding: What was learned of how the inputs are rounded; None where they stay as they are.
        spread: How far the drifts over two halves of the tokens lie apart, float32 [B, C, C], on any device, see
            `InputSums.spread_`; None where there are no halves. Then a share that is to be measured is the usual one.
    """

    H: torch.Tensor
    drift: torch.Tensor | None = None
    lacks_statistics: Sequence[bool] = ()
    rounding: RoundingMoments | None = None
    spread: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is measured of each row, float32 [B, R].

    Attributes:
        error: The layer error ‖ŵX̂ − wX‖², see `output_error`.
        energy: What it is relative to, ‖wX‖².
        maximum_before: Mean group maximum of the original weights.
        maximum_after: Mean group maximum of the regularized weights.
    """

    error: torch.Tensor
    energy: torch.Tensor
    maximum_before: torch.Tensor
    maximum_after: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SolvedRows:
    """Some rows on their grid.

    Attributes:
        Q: The integers, int8 [B, R, C].
        grid: Scale and zero point of each group of columns.
        figures: What was measured of each row.
    """

    Q: torch.Tensor
    grid: Grid
    figures: Figures


@dataclasses.dataclass(frozen=True)
class InputGroupOutcome:
    """What was decided for all rows of an input group.

    Attributes:
        beta: Strength of the regularization.
        beta_gain: Share of the sampled rows' error before refinement that it saved against 0; 0 if not searched.
        damping: Share of the mean diagonal that the Hessian needed.
        factorizations: Number of factorizations that were tried.
        seconds: Time by phase.
    """

    beta: float
    beta_gain: float
    damping: float
    factorizations: int
    seconds: dict[str, float]
