"""What is done to the inputs of quantized layers: frozen settings that check themselves.

Inputs are rounded by the server while it computes. Dynamic: each token (the last dimension of a layer's input) gets a
scale of its own from its largest magnitude, with no zero point. Nothing of that is stored, so the files of the weights
are the same; only config.json tells the server. Static: every input of a layer is rounded between two clips that
training learned, which are stored beside the weights.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = ["MOST_RANK", "ActivationScheme", "Activations", "Reconstruction"]

MOST_RANK = 512
"""Largest rank of a correction, the largest of an adapter that vLLM takes."""


@dataclasses.dataclass(frozen=True)
class ActivationScheme:
    """The kind of grid that inputs of layers are rounded to.

    Attributes:
        bits: Width of one input, 8 or 4.
        type: `int` for integers; `float` for FP8 E4M3, which has 8 bits.
        is_static: Whether each layer has a grid of its own between two clips; otherwise each token has a scale, found
            as the token comes (dynamic), and no zero point.
    """

    bits: int
    type: Literal["int", "float"]
    is_static: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"inputs of layers: expected 4 or 8 bits, got {self.bits}")
        if self.type not in ("int", "float"):
            raise ConfigError(f"inputs of layers: expected type int or float, got {self.type}")
        if self.type == "float" and self.bits != 8:
            raise ConfigError(f"inputs of layers: type float is FP8 (E4M3) and has 8 bits, got {self.bits}")
        if self.type == "float" and self.is_static:
            raise ConfigError("inputs of layers: between clips they are integers, got type float")

    @property
    def in_words(self) -> str:
        """The grid in words, such as "int8 per token" or "int4 between learned clips"."""
        if self.is_static:
            return f"int{self.bits} between learned clips"
        return f"{'FP8' if self.type == 'float' else f'int{self.bits}'} per token"

    @property
    def short_name(self) -> str:
        """The grid in a name, such as "a8" in `w4a8g128`."""
        return "afp8" if self.type == "float" else f"a{self.bits}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """What servers do with the inputs of quantized layers."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    bits: Literal[16, 8, 4] = 16
    """Width of the inputs of every quantized layer, as servers round them: 8 or 4, or 16 for inputs that stay as they
    are. Each token gets a scale of its own while the server computes, unless `clips` says otherwise. It is written into
    config.json; the stored weights need nothing for it. A run rounds inputs in the same way wherever it runs quantized
    layers, so that its figures are those with rounded inputs, and weights make up for what they can
    (`quantization.compensation`)."""
    type: Literal["int", "float"] = "int"
    """What inputs are rounded to: `int` is integers of `bits`, `float` is FP8 (E4M3), which has 8 bits."""
    clips: Literal["none", "from-checkpoint"] = "none"
    """Where the range of inputs comes from: each token's largest magnitude (`none`), or the two clips that
    `astro-dist train` learned for each layer (`from-checkpoint`). With clips, all inputs of a layer
    are rounded between its clips in steps of equal size, as they were in training, which must have had the same width.
    The clips are read from activation_clips.safetensors beside the weights. Every quantized layer must have them. No
    server that we know of computes so; transformers does."""
    smoothing: Literal["none", "aser", "smoothquant"] = "none"
    """How channels of the inputs that are much larger than others are made smaller, and the weights that read them
    larger. The factors go into the norm or the linear layer that makes an input, where that is exact, so that they cost
    nothing; which inputs stay as they are is reported. `aser` takes the channels of largest mean |x| · mean |w|,
    whose weights the corrections of low rank then hold alone if `reconstruction.rank` is at least `outlier_channels`;
    `smoothquant` takes all channels."""
    outlier_channels: int = 32
    """With `smoothing: aser`: number of channels of each input that are made smaller. Channels that one row of weights
    makes, as heads of queries that share one of values, are made smaller together, and no more than these in all."""
    smoothing_strength: float = 0.5
    """With `smoothing: smoothquant`: exponent of the inputs, from 0 to 1. The larger it is, the more of what is large
    moves into the weights."""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """How servers hold keys and values: `fp8` in FP8 (E4M3), with scales of each attention that calibration measures;
    `auto` as the server chooses. Forwards of quantized blocks round keys and values in the same way."""

    def __post_init__(self) -> None:
        if self.type == "float" and self.bits != 8:
            raise ConfigError(f"type: float is FP8 and wants bits: 8, got bits: {self.bits}")
        if self.smoothing != "none" and self.bits == 16:
            raise ConfigError(
                f"smoothing: {self.smoothing} makes inputs easier to round, and bits: 16 rounds none; set bits to 8 or "
                "4, or smoothing to none"
            )
        self._check_clips()
        if self.outlier_channels < 1:
            raise ConfigError(f"outlier_channels: expected at least 1, got {self.outlier_channels}")
        if not 0 <= self.smoothing_strength <= 1:
            raise ConfigError(f"smoothing_strength: expected 0 to 1, got {self.smoothing_strength}")
        self._refuse_without_rule()

    def _check_clips(self) -> None:
        """Refuse learned clips beside settings that they contradict."""
        if not self.has_clips:
            return
        if self.bits == 16:
            raise ConfigError(
                f"clips: {self.clips} says between which numbers inputs are rounded, and bits: 16 rounds none; set "
                "bits to the width that the clips were learned for, 8 or 4, or clips to none"
            )
        if self.type == "float":
            raise ConfigError(f"clips: {self.clips} rounds inputs to integers, got type: float; take type: int")
        if self.smoothing != "none":
            raise ConfigError(
                f"clips: {self.clips} holds for inputs as training made them, and smoothing: {self.smoothing} makes "
                "them smaller; set smoothing to none, or clips to none"
            )

    def _refuse_without_rule(self) -> None:
        """Refuse settings of a rule that is not the one in use."""
        for name, rule in (("outlier_channels", "aser"), ("smoothing_strength", "smoothquant")):
            default = type(self).__dataclass_fields__[name].default
            if self.smoothing != rule and getattr(self, name) != default:
                raise ConfigError(f"{name}: {getattr(self, name)} has no effect without smoothing: {rule}")

    @property
    def scheme(self) -> ActivationScheme | None:
        """The grid of the inputs; None where they stay as they are."""
        return None if self.bits == 16 else ActivationScheme(self.bits, self.type, self.has_clips)

    @property
    def has_clips(self) -> bool:
        """Whether each layer rounds its inputs between clips that training learned."""
        return self.clips != "none"

    @property
    def rounds_cache(self) -> bool:
        """Whether servers hold keys and values in FP8."""
        return self.kv_cache == "fp8"

    @property
    def in_words(self) -> str:
        """What the inputs are, such as "int8 per token"; empty where they stay as they are."""
        return "" if self.scheme is None else self.scheme.in_words

    @property
    def rounded_in_words(self) -> tuple[str, ...]:
        """What servers round besides weights, such as "inputs int8 per token" and "FP8 cache"."""
        inputs = (f"inputs {self.in_words}",) if self.in_words else ()
        return (*inputs, "FP8 cache") if self.rounds_cache else inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """ASER's correction of low rank (arXiv 2411.07762), which servers add to a quantized layer's outputs."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    rank: int | Literal["auto"] = 0
    """Rank of the correction of each quantized linear layer outside experts, from the error that the solve leaves; 0 is
    none. A layer's correction has rank · (inputs + outputs) weights of 16 bits (bfloat16 where the source has float32),
    and takes as many multiplications a token. All of them are a LoRA adapter of PEFT in the folder `adapter` of the
    model, which servers have to be told to load. `auto` takes the least rank that holds `energy`, at most 512. What
    rounding leaves is spread over nearly all directions alike, so that this is mostly a very large rank: choose 16, 32
    or 64 unless you know that a few directions hold most of the error."""
    energy: float = 0.9
    """With `rank: auto`: share of the squared error of a layer's outputs that the correction takes away, above 0 and at
    most 1."""

    def __post_init__(self) -> None:
        if self.rank != "auto" and not 0 <= self.rank <= MOST_RANK:
            raise ConfigError(f"rank: expected auto or 0 to {MOST_RANK}, the largest that vLLM takes, got {self.rank}")
        if not 0 < self.energy <= 1:
            raise ConfigError(f"energy: expected more than 0 and at most 1, got {self.energy}")
        if self.rank != "auto" and self.energy != type(self).energy:
            raise ConfigError(f"energy: only with rank: auto, got {self.energy} with rank {self.rank}")

    @property
    def most_rank(self) -> int:
        """The largest rank that a correction may have."""
        return MOST_RANK if self.rank == "auto" else self.rank

    @property
    def is_on(self) -> bool:
        """Whether anything is corrected."""
        return self.rank != 0

    def holds_channels(self, activations: Activations) -> bool:
        """Tell whether corrections hold the weights of the outlier channels that smoothing has made larger.

        They do as ASER has it, where they have rank enough for all of them. Less rank would leave some of them out.

        Args:
            activations: What is done to inputs.
        """
        has_rank = self.rank != "auto" and self.rank >= activations.outlier_channels
        return activations.smoothing == "aser" and has_rank

    def minds_rounding(self, activations: Activations) -> bool:
        """Tell whether corrections mind that they read inputs as they are, and their layer reads them rounded.

        Dynamic grids of 8 bits take so little from inputs that nothing would be gained by it, and it takes two matrices
        of inputs × inputs. Learned clips may cut off much with 8 bits too.

        Args:
            activations: What servers do with inputs.
        """
        return self.is_on and (activations.bits < 8 or activations.has_clips)
