"""What is done to the weights: frozen settings that check themselves.

All classes are plain dataclasses. `__pydantic_config__` only matters where pydantic embeds them in a larger
configuration: a key they do not know is then refused.
"""

import dataclasses
import math
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = ["BITS", "PER_CHANNEL", "Experts", "Override", "Quantization", "Regularizer"]

BITS = (2, 3, 4, 8)
"""Widths that a weight can have."""

PER_CHANNEL = -1
"""Group size that means one group over all input columns."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_grid(bits: int | None, group_size: int | None) -> None:
    _require(bits is None or bits in BITS, f"bits: expected 2, 3, 4 or 8, got {bits}")
    valid_group = group_size is None or group_size == PER_CHANNEL or group_size >= 8
    _require(valid_group, f"group_size: expected -1 (per channel) or at least 8, got {group_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """What is different for some layers; what is not given stays as it is for all."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        _require_grid(self.bits, self.group_size)
        given = any(value is not None for value in dataclasses.astuple(self))
        _require(given, "expected at least one of bits, group_size, symmetric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which grid the weights go to, how they are rounded and which file layout holds them."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: int | Literal["auto"] = 4
    """Width of one weight: 2, 3, 4 or 8; `auto` spends `average_bits` where the measured layer errors say."""
    average_bits: float | None = None
    """With `bits: auto`: mean width over all quantized weights, at most; scales are not counted."""
    bit_choices: tuple[int, ...] = BITS
    """With `bits: auto`: widths to choose from."""
    group_size: int = 128
    """Contiguous input columns that share a scale; -1 is one scale a row (per channel)."""
    odd_widths: Literal["fail", "per-channel", "keep"] = "fail"
    """Layers whose input is no multiple of the group size: `fail` refuses the run, `per-channel` gives each of their
    rows one scale, `keep` leaves them as they are. Each use is told."""
    symmetric: bool = True
    """Zero point fixed at 0. CUDA Marlin kernels want this."""
    method: Literal["gptq", "rtn"] = "gptq"
    """`gptq` compensates each column's error in the columns after it; `rtn` rounds to nearest."""
    act_order: Literal["static", "none"] = "static"
    """`static` visits columns by falling activation energy on a grid fixed beforehand; costs nothing at inference."""
    scale_search: Literal["hessian", "mse", "minmax"] = "hessian"
    """`hessian` shrinks each group's range to the least error with each column's error at the cost that is left when
    later columns have made up for it; `mse` weighs all columns alike; `minmax` covers the range."""
    signed_scales: bool = True
    """Let a symmetric group's scale be negative where that fits better: an even number of levels reaches one step
    further on one side, and the sign chooses which. Costs nothing at inference; not with `minmax`."""
    refine_passes: int = 4
    """Passes of coordinate descent over integers and scales after GPTQ, at most; 0 is none."""
    refine_tolerance: float = 1e-3
    """A pass that lowers the layer error by a smaller share is the last."""
    compensation: float = 0.25
    """In mode `sequential`: share of the errors made before a layer that its own weights make up for; 0 is none."""
    damping: float = 0.01
    """Share of the mean diagonal that is added to the Hessian's diagonal."""
    max_damping: float = 1.0
    """Where the damping ladder (times 10 at each failed factorization) ends in an error."""
    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    """File layout: compressed-tensors `pack-quantized`, or GPTQ version 1, which holds symmetric grids alone."""
    ignore: tuple[str, ...] = ()
    """Names (shell patterns) of linear layers inside blocks that stay as they are."""
    overrides: dict[str, Override] = dataclasses.field(default_factory=dict)
    """What is different for layers whose name matches a shell pattern; of several that match, the last wins."""

    def __post_init__(self) -> None:
        _require_grid(None if self.bits == "auto" else self.bits, self.group_size)
        self._check_budget()
        asymmetric = not self.symmetric or any(override.symmetric is False for override in self.overrides.values())
        _require(not (asymmetric and self.format == "gptq"), "format: gptq wants symmetric: true")
        _require(0 <= self.compensation <= 1, f"compensation: expected 0 to 1, got {self.compensation}")
        _require(0 <= self.refine_passes <= 100, f"refine_passes: expected 0 to 100, got {self.refine_passes}")
        _require(
            math.isfinite(self.refine_tolerance) and self.refine_tolerance >= 0,
            f"refine_tolerance: expected a number >= 0, got {self.refine_tolerance}",
        )
        _require(
            math.isfinite(self.damping) and 0 < self.damping <= self.max_damping <= 1e3,
            f"damping: expected 0 < damping <= max_damping <= 1000, got {self.damping} and {self.max_damping}",
        )

    def _check_budget(self) -> None:
        choices = self.bit_choices
        _require(
            bool(choices) and all(bits in BITS for bits in choices) and len(set(choices)) == len(choices),
            f"bit_choices: expected different widths of 2, 3, 4 and 8, got {list(choices)}",
        )
        if self.bits != "auto":
            _require(self.average_bits is None, "average_bits: only with bits: auto")
            return
        _require(self.average_bits is not None, "bits: auto wants average_bits, e.g. 3.5")
        _require(self.method == "gptq", "bits: auto wants method: gptq")
        average = self.average_bits or 0.0
        _require(
            min(choices) <= average <= max(choices),
            f"average_bits: expected {min(choices)} to {max(choices)} (bit_choices), got {average}",
        )

    @property
    def compensates(self) -> bool:
        """Whether, in mode `sequential`, layers make up for the errors of those before."""
        return self.compensation > 0 and self.method == "gptq"

    @property
    def width(self) -> int:
        """Bits of one weight, where they are settled: see `for_layer`."""
        assert self.bits != "auto", "the width of this layer is not settled yet"
        return self.bits

    def for_layer(self, name: str, bits: int | None = None) -> "Quantization":
        """The settings of one layer.

        Args:
            name: module name of the layer.
            bits: its width where `bits` is `auto` and no override sets it; None leaves it open.
        """
        changes: dict[str, Any] = {}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                given = dataclasses.asdict(override)
                changes |= {key: value for key, value in given.items() if value is not None}
        if self.bits == "auto" and bits is not None:
            changes.setdefault("bits", bits)
        if changes.get("bits", "auto") != "auto":
            changes["average_bits"] = None
        return dataclasses.replace(self, overrides={}, **changes)

    def divides(self, num_columns: int) -> bool:
        """Whether groups fit a layer of `num_columns` inputs."""
        return self.group_size == PER_CHANNEL or num_columns % self.group_size == 0

    def fitted(self, num_columns: int) -> "Quantization":
        """The settings of a layer of `num_columns` inputs: per channel where groups do not fit it and that is asked."""
        if self.odd_widths != "per-channel" or self.divides(num_columns):
            return self
        return dataclasses.replace(self, group_size=PER_CHANNEL)

    def columns_per_group(self, num_columns: int) -> int:
        """Columns that share a scale in a layer of `num_columns` inputs.

        Raises:
            ConfigError: the group size does not divide the layer's width.
        """
        if self.group_size == PER_CHANNEL:
            return num_columns
        if not self.divides(num_columns):
            fits = [g for g in (32, 64, 96, 128, 192, 256) if num_columns % g == 0]
            raise ConfigError(
                f"group_size {self.group_size} does not divide a layer of {num_columns} input columns; "
                f"sizes that do: {', '.join(map(str, fits)) or 'none of the usual ones'}, -1 (per channel), or "
                "say in quantization.odd_widths what shall become of such layers"
            )
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regularizer:
    """Astro (arXiv 2602.07596) or its ablation MagR (arXiv 2406.00800), applied to the weights before quantization."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: Literal["astro", "magr", "none"] = "astro"
    """`astro` weights each group's penalty by its activations (eq. 11); `magr` weights all alike; `none` skips."""
    beta: float | Literal["auto"] = "auto"
    """Strength of the penalty, in units given by `beta_unit`, with the Hessian scaled to a largest eigenvalue of 1;
    `auto` measures a few on sampled rows of every layer group, 0 among them, and takes the best."""
    beta_unit: Literal["relative", "absolute"] = "relative"
    """`relative`: beta is multiplied by the layer's mean group maximum; `absolute`: the papers' own units."""
    solver: Literal["admm", "pgd"] = "admm"
    """`admm` comes close in a few iterations; `pgd` is the published proximal gradient (200 iterations)."""
    iterations: int | None = None
    """Iterations of the solver, always all of them; 6 for `admm` and 200 for `pgd` where not given."""
    rho: float = 1e-3
    """ADMM's penalty parameter, where the Hessian's largest eigenvalue is 1."""

    def __post_init__(self) -> None:
        valid_beta = self.beta == "auto" or (math.isfinite(self.beta) and self.beta >= 0)
        _require(valid_beta, f"beta: expected auto or a number >= 0, got {self.beta}")
        _require(
            self.beta != "auto" or self.beta_unit == "relative", "beta_unit: beta: auto is relative, give a number"
        )
        _require(1 <= self.steps <= 10_000, f"iterations: expected 1 to 10000, got {self.iterations}")
        # Less would ask more of an inverse in float32 than it can hold; more than 1 hardly moves.
        _require(1e-4 <= self.rho <= 1, f"rho: expected 1e-4 to 1, got {self.rho}")

    @property
    def is_searched(self) -> bool:
        """Whether β is chosen by measurement."""
        return self.name != "none" and self.beta == "auto"

    @property
    def steps(self) -> int:
        """Iterations, the solver's own number where none is given."""
        return self.iterations if self.iterations is not None else {"admm": 6, "pgd": 200}[self.solver]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """What is done about experts that too few calibration tokens reach."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    min_tokens: int = 256
    """Tokens below which an expert's own statistics are not used."""
    policy: Literal["all-tokens", "shared-hessian", "rtn", "fail"] = "all-tokens"
    """`all-tokens`: all tokens pass through it for its statistics, not for its result; `shared-hessian`: those of all
    experts of the layer together; `rtn`: it is rounded to nearest; `fail`: the run ends. Every use is recorded."""

    def __post_init__(self) -> None:
        _require(self.min_tokens >= 1, f"min_tokens: expected at least 1, got {self.min_tokens}")
