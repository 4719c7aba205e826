"""What is done to the weights: frozen settings that check themselves.

All classes are plain dataclasses. `__pydantic_config__` only matters where pydantic embeds them in a larger
configuration: a key they do not know is then refused.
"""

import dataclasses
import math
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = [
    "BITS", "PER_CHANNEL", "SERVED_GROUP_SIZES", "Experts", "LayerScheme", "Override", "Quantization", "Regularizer",
    "SolverSettings",
]  # fmt: skip

BITS = (2, 3, 4, 8)
"""Widths that a weight can have."""

PER_CHANNEL = -1
"""Group size that means one group over all input columns."""

SERVED_GROUP_SIZES = (32, 64, 128)
"""Group sizes that the fast kernels of servers (Marlin in vLLM) take, besides `PER_CHANNEL`."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_grid(bits: int | None, group_size: int | None) -> None:
    _require(bits is None or bits in BITS, f"bits: expected 2, 3, 4 or 8, got {bits}")
    valid_group = group_size is None or group_size == PER_CHANNEL or group_size >= 8
    _require(valid_group, f"group_size: expected -1 (per channel) or at least 8, got {group_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """The grid of one layer, with everything settled."""

    bits: int = 4
    """Width of one weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Contiguous input columns that share a scale; -1 is one scale a row (per channel)."""
    symmetric: bool = True
    """Whether every zero point is fixed at 0."""

    def __post_init__(self) -> None:
        _require_grid(self.bits, self.group_size)

    @property
    def num_levels(self) -> int:
        """Number of integers that a weight can have."""
        return 1 << self.bits

    def divides(self, num_columns: int) -> bool:
        """Tell whether groups fit a layer of `num_columns` inputs."""
        return self.group_size == PER_CHANNEL or num_columns % self.group_size == 0

    def columns_per_group(self, num_columns: int) -> int:
        """Return the columns that share a scale in a layer of `num_columns` inputs.

        Raises:
            ConfigError: The group size does not divide the number of inputs.
        """
        if self.group_size == PER_CHANNEL:
            return num_columns
        if not self.divides(num_columns):
            fits = [size for size in SERVED_GROUP_SIZES if num_columns % size == 0]
            raise ConfigError(
                f"group_size {self.group_size} does not divide a layer of {num_columns} input columns; "
                f"sizes that do, and that servers' kernels take: {', '.join(map(str, [*fits, PER_CHANNEL]))} (-1 is "
                "one scale a row); or say in quantization.indivisible what shall become of such layers"
            )
        return self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Override:
    """What is different for some layers. A field that is not set stays as it is for all layers."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: int | None = None
    """Width of one weight: 2, 3, 4 or 8."""
    group_size: int | None = None
    """Contiguous input columns that share a scale; -1 is one scale a row."""
    symmetric: bool | None = None
    """Whether every zero point is fixed at 0."""

    def __post_init__(self) -> None:
        _require_grid(self.bits, self.group_size)
        _require(bool(self.changes), "expected at least one of bits, group_size, symmetric")

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that are set, by name."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """How weights are put on a grid, whatever the grid."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    method: Literal["gptq", "rtn"] = "gptq"
    """`gptq` makes up for each column's error in the columns after it; `rtn` rounds every weight to nearest."""
    act_order: Literal["static", "none"] = "static"
    """`static` visits columns by falling activation energy, on a grid that is fixed beforehand, which costs nothing at
    inference; `none` visits them as they lie."""
    scale_search: Literal["hessian", "mse", "minmax"] = "hessian"
    """`hessian` shrinks each group's range to the least error, where the error of a column counts with the cost that is
    left when later columns have made up for it; `mse` lets all columns count alike; `minmax` covers the whole range."""
    signed_scales: bool = True
    """Whether a symmetric group's scale may be negative where that fits better. An even number of levels reaches one
    step further on one side, and the sign chooses which. It costs nothing at inference, and has no effect with
    `minmax`."""
    refine_passes: int = 4
    """Most passes of coordinate descent over integers and scales after GPTQ, from 0, which is none, to 100."""
    refine_tolerance: float = 1e-3
    """A pass that lowers the layer error by a smaller share is the last."""
    tune_steps: int = 0
    """Steps of gradient descent by which the scales of a solved block are tuned, all layers together, so that it
    returns what the original block returns, as nearly as it can; from 0, which is none, to 1000, and 40 are enough. A
    step takes one sequence of the calibration text, and about as long as three forward passes of it; to measure takes
    three passes of each sequence more."""
    compensation: float | Literal["auto"] = "auto"
    """Share of errors in a layer's inputs that its weights make up for, from 0, which is none, to 1. In the modes
    `stages` and `sequential` those of layers before: `auto` measures for every input group which share of the
    correction two halves of the text agree on. In every mode, what rounding takes from inputs (`activations`): `auto`
    makes up for all of it with 4 bits, and for nothing with 8, where that gains nothing. With learned clips
    (`activations.clips`), for which weights were trained, `auto` is 0 in every mode."""
    damping: float = 0.01
    """Share of the mean diagonal that is added to the Hessian's diagonal."""
    max_damping: float = 1.0
    """Largest damping. Where a factorization fails the damping is multiplied by 10 and tried again, and beyond this
    share the run ends in an error."""

    def __post_init__(self) -> None:
        valid_share = self.compensation == "auto" or 0 <= self.compensation <= 1
        _require(valid_share, f"compensation: expected auto or 0 to 1, got {self.compensation}")
        _require(0 <= self.refine_passes <= 100, f"refine_passes: expected 0 to 100, got {self.refine_passes}")
        _require(0 <= self.tune_steps <= 1000, f"tune_steps: expected 0 to 1000, got {self.tune_steps}")
        _require(
            math.isfinite(self.refine_tolerance) and self.refine_tolerance >= 0,
            f"refine_tolerance: expected a number >= 0, got {self.refine_tolerance}",
        )
        _require(
            math.isfinite(self.damping) and 0 < self.damping <= self.max_damping <= 1e3,
            f"damping: expected 0 < damping <= max_damping <= 1000, got {self.damping} and {self.max_damping}",
        )

    @property
    def compensates(self) -> bool:
        """Whether layers make up for errors in their inputs: those of layers before, and what rounding takes."""
        return self.compensation != 0 and self.method == "gptq"

    def makes_up_for_rounding(self, input_bits: int) -> bool:
        """Tell whether weights make up for what rounding takes from the inputs of their layer.

        With `auto` they do for 4 bits alone: 8 bits take so little that the result is no better for it, and it would
        take a matrix of inputs × inputs.

        Args:
            input_bits: Width of the inputs as servers round them; 16 where they stay as they are.
        """
        return self.compensates and (input_bits < 8 if self.compensation == "auto" else input_bits < 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization(SolverSettings):
    """What is asked for: which grid the weights go to, how they are rounded and which file layout holds them."""

    bits: int | Literal["auto"] = 4
    """Width of one weight: 2, 3, 4, 8 or `auto`, which spends `average_bits` where the measured layer errors say."""
    average_bits: float | None = None
    """With `bits: auto`: the largest mean width over all quantized weights. Scales are not counted."""
    bit_choices: tuple[int, ...] = BITS
    """With `bits: auto`: the widths to choose from."""
    group_size: int = 128
    """Contiguous input columns that share a scale; -1 is one scale a row (per channel)."""
    indivisible: Literal["fail", "per-channel", "keep"] = "fail"
    """What becomes of layers whose number of inputs is no multiple of the group size: `fail` refuses the run,
    `per-channel` gives each of their rows one scale, `keep` leaves them as they are. Every use is reported."""
    symmetric: bool = True
    """Whether every zero point is fixed at 0. CUDA Marlin kernels want this."""
    format: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    """File layout: compressed-tensors `pack-quantized`, or GPTQ version 1, which holds symmetric grids alone."""
    ignore: tuple[str, ...] = ()
    """Names (shell patterns) of linear layers inside blocks that stay as they are."""
    overrides: dict[str, Override] = dataclasses.field(default_factory=dict)
    """What is different for layers whose name matches a shell pattern; of several that match, the last wins."""

    def __post_init__(self) -> None:
        _require(self.bits == "auto" or self.bits in BITS, f"bits: expected 2, 3, 4, 8 or auto, got {self.bits}")
        _require_grid(None, self.group_size)
        self._check_budget()
        asymmetric = not self.symmetric or any(override.symmetric is False for override in self.overrides.values())
        _require(not (asymmetric and self.format == "gptq"), "format: gptq wants symmetric: true")
        super().__post_init__()

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

    def bits_of(self, name: str) -> int | Literal["auto"]:
        """Return the width of a layer by its module name, `auto` where it is yet to be chosen."""
        bits: int | Literal["auto"] = self._of_layer(name)["bits"]
        return bits

    def is_indivisible(self, name: str, num_columns: int) -> bool:
        """Tell whether the number of inputs of a layer is no multiple of its group size."""
        return not LayerScheme(group_size=self._of_layer(name)["group_size"]).divides(num_columns)

    def possible_schemes(self, name: str, num_columns: int) -> tuple[LayerScheme, ...]:
        """Return every grid that a layer may get: one, or with `bits: auto` one for each width to choose from.

        Args:
            name: Module name of the layer.
            num_columns: Number of its inputs.
        """
        settings = self._of_layer(name)
        per_channel = self.indivisible == "per-channel" and self.is_indivisible(name, num_columns)
        size = PER_CHANNEL if per_channel else settings["group_size"]
        choices = self.bit_choices if settings["bits"] == "auto" else (settings["bits"],)
        return tuple(LayerScheme(bits=bits, group_size=size, symmetric=settings["symmetric"]) for bits in choices)

    def scheme(self, name: str, num_columns: int, chosen_bits: int | None = None) -> LayerScheme:
        """Return the grid of a layer.

        Args:
            name: Module name of the layer.
            num_columns: Number of its inputs.
            chosen_bits: Its width where `bits` is `auto` and no override sets it.

        Raises:
            ConfigError: The width is open, and none was chosen.
        """
        possible = self.possible_schemes(name, num_columns)
        if self.bits_of(name) != "auto":
            return possible[0]
        if chosen_bits is None:
            raise ConfigError(f"bits: auto: no width was chosen for {name}")
        return dataclasses.replace(possible[0], bits=chosen_bits)

    def _of_layer(self, name: str) -> dict[str, Any]:
        """The width, group size and symmetry of a layer, overrides applied."""
        settings: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                settings |= override.changes
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regularizer:
    """Astro (arXiv 2602.07596) or its ablation MagR (arXiv 2406.00800), applied to the weights before quantization."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: Literal["astro", "magr", "none"] = "astro"
    """`astro` makes each group's penalty as large as its activations (eq. 11); `magr` takes one penalty for all groups;
    `none` leaves the weights as they are."""
    beta: float | Literal["auto"] = "auto"
    """Strength of the penalty in the unit `beta_unit`, with the Hessian scaled to a largest eigenvalue of 1. `auto`
    measures a few strengths, 0 among them, on sampled rows of the layers that read one input, and takes the best."""
    beta_unit: Literal["relative", "absolute"] = "relative"
    """With `relative` beta is multiplied by the layer's mean group maximum; `absolute` is the unit of the papers."""
    solver: Literal["admm", "pgd"] = "admm"
    """`admm` comes close in a few iterations; `pgd` is the published proximal gradient (200 iterations)."""
    iterations: int | None = None
    """Iterations of the solver, which always does all of them; where not set, 6 for `admm` and 200 for `pgd`."""
    rho: float = 1e-3
    """Penalty parameter of ADMM, where the Hessian's largest eigenvalue is 1."""

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
        """Iterations, the solver's usual number where none is set."""
        return self.iterations if self.iterations is not None else {"admm": 6, "pgd": 200}[self.solver]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """What is done about experts that too few calibration tokens reach."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    min_tokens: int = 256
    """Calibration tokens below which an expert's statistics are not used."""
    policy: Literal["all-tokens", "shared-hessian", "rtn", "fail"] = "all-tokens"
    """What happens to such an expert. With `all-tokens` all tokens pass through it for its statistics, though not for
    its result; with `shared-hessian` it gets the statistics of all experts of the layer together; with `rtn` it is
    rounded to nearest; with `fail` the run ends. Every use is recorded."""

    def __post_init__(self) -> None:
        _require(self.min_tokens >= 1, f"min_tokens: expected at least 1, got {self.min_tokens}")
