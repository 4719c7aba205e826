"""What is done to the inputs of quantized layers: frozen settings that check themselves.

Inputs are rounded by the server while it computes: each token (the last dimension of a layer's input) gets a scale of
its own from its largest magnitude, with no zero point. Nothing of that is stored, so the files of the weights are the
same; only config.json tells the server.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = ["ActivationScheme", "Activations"]


@dataclasses.dataclass(frozen=True)
class ActivationScheme:
    """The grid of a layer's inputs: one scale a token, found as the token comes (dynamic), no zero point.

    Attributes:
        bits: Width of one input, 8 or 4.
        type: `int` for integers; `float` for FP8 E4M3, which has 8 bits.
    """

    bits: int
    type: Literal["int", "float"]

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"inputs of layers: expected 4 or 8 bits, got {self.bits}")
        if self.type not in ("int", "float"):
            raise ConfigError(f"inputs of layers: expected type int or float, got {self.type}")
        if self.type == "float" and self.bits != 8:
            raise ConfigError(f"inputs of layers: type float is FP8 (E4M3) and has 8 bits, got {self.bits}")

    @property
    def in_words(self) -> str:
        """The grid in words, such as "int8 per token"."""
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
    are. Each token gets a scale of its own while the server computes. It is written into config.json; the stored
    weights need nothing for it. A run measures perplexity with inputs that are not rounded."""
    type: Literal["int", "float"] = "int"
    """What inputs are rounded to: `int` is integers of `bits`, `float` is FP8 (E4M3), which has 8 bits."""

    def __post_init__(self) -> None:
        if self.type == "float" and self.bits != 8:
            raise ConfigError(f"type: float is FP8 and wants bits: 8, got bits: {self.bits}")

    @property
    def scheme(self) -> ActivationScheme | None:
        """The grid of the inputs; None where they stay as they are."""
        return None if self.bits == 16 else ActivationScheme(self.bits, self.type)

    @property
    def in_words(self) -> str:
        """What the inputs are, such as "int8 per token"; empty where they stay as they are."""
        return "" if self.scheme is None else self.scheme.in_words
