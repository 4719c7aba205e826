"""What is done to the weights: frozen settings that check themselves.

Both classes are plain dataclasses. `__pydantic_config__` only matters where pydantic embeds them in a larger
configuration: a key they do not know is then refused.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = ["PER_CHANNEL", "Quantization", "Regularizer"]

PER_CHANNEL = -1
"""Group size that means one group over all input columns."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which grid the weights go to, how they are rounded and which file layout holds them."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: int = 4
    """Width of one weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Contiguous input columns that share a scale; -1 is one scale a row (per channel)."""
    symmetric: bool = True
    """Zero point fixed at 0. CUDA Marlin kernels want this."""
    method: Literal["gptq", "rtn"] = "gptq"
    """`gptq` compensates each column's error in the columns after it; `rtn` rounds to nearest."""
    act_order: Literal["static", "none"] = "static"
    """`static` visits columns by falling activation energy on a grid fixed beforehand; costs nothing at inference."""
    scale_search: Literal["mse", "minmax"] = "mse"
    """`mse` shrinks each group's range to the least error; `minmax` covers the range."""
    damping: float = 0.01
    """Share of the mean diagonal that is added to the Hessian's diagonal."""
    max_damping: float = 1.0
    """Where the damping ladder (times 10 at each failed factorization) ends in an error."""
    format: Literal["compressed-tensors"] = "compressed-tensors"
    """File layout: compressed-tensors `pack-quantized`."""
    ignore: tuple[str, ...] = ()
    """Names (shell patterns) of linear layers inside blocks that stay as they are."""

    def __post_init__(self) -> None:
        _require(self.bits in (2, 3, 4, 8), f"bits: expected 2, 3, 4 or 8, got {self.bits}")
        valid_group = self.group_size == PER_CHANNEL or self.group_size >= 8
        _require(valid_group, f"group_size: expected -1 (per channel) or at least 8, got {self.group_size}")
        _require(
            math.isfinite(self.damping) and 0 < self.damping <= self.max_damping <= 1e3,
            f"damping: expected 0 < damping <= max_damping <= 1000, got {self.damping} and {self.max_damping}",
        )

    def columns_per_group(self, num_columns: int) -> int:
        """Columns that share a scale in a layer of `num_columns` inputs.

        Raises:
            ConfigError: the group size does not divide the layer's width.
        """
        if self.group_size == PER_CHANNEL:
            return num_columns
        if num_columns % self.group_size:
            fits = [g for g in (32, 64, 96, 128, 192, 256) if num_columns % g == 0]
            raise ConfigError(
                f"group_size {self.group_size} does not divide a layer of {num_columns} input columns; "
                f"sizes that do: {', '.join(map(str, fits)) or 'none of the usual ones'}, or -1 (per channel)"
            )
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regularizer:
    """Astro (arXiv 2602.07596) or its ablation MagR (arXiv 2406.00800), applied to the weights before quantization."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: Literal["astro", "magr", "none"] = "astro"
    """`astro` weights each group's penalty by its activations (eq. 11); `magr` weights all alike; `none` skips."""
    beta: float = 5e-5
    """Strength of the penalty, in units given by `beta_unit`, with the Hessian scaled to a largest eigenvalue of 1."""
    beta_unit: Literal["relative", "absolute"] = "relative"
    """`relative`: beta is multiplied by the layer's mean group maximum; `absolute`: the papers' own units."""
    solver: Literal["admm", "pgd"] = "admm"
    """`admm` converges in about 20 iterations; `pgd` is the published proximal gradient (200 iterations)."""
    iterations: int | None = None
    """Iterations of the solver, always all of them; 20 for `admm` and 200 for `pgd` where not given."""
    rho: float = 1e-3
    """ADMM's penalty parameter, where the Hessian's largest eigenvalue is 1."""

    def __post_init__(self) -> None:
        _require(math.isfinite(self.beta) and self.beta >= 0, f"beta: expected a number >= 0, got {self.beta}")
        _require(1 <= self.steps <= 10_000, f"iterations: expected 1 to 10000, got {self.iterations}")
        _require(math.isfinite(self.rho) and self.rho > 0, f"rho: expected a number > 0, got {self.rho}")

    @property
    def steps(self) -> int:
        """Iterations, the solver's own number where none is given."""
        return self.iterations if self.iterations is not None else {"admm": 20, "pgd": 200}[self.solver]
