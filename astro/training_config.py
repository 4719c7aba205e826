"""What is done to a model while it is trained, so that it can be quantized: frozen settings that check themselves."""

import dataclasses
from typing import Any, ClassVar, Literal

from astro.errors import ConfigError

__all__ = ["ActivationRegularization"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationRegularization:
    """What is done to the linear layers of the blocks while a model is trained."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    input_bits: int | None = 4
    """The width to which the inputs of layers are rounded while they are trained, from 2 to 8 bits; with nothing
    (`null`), inputs stay as they are."""
    clip: float = 4.0
    """The clips of every layer at the start: minus and plus this number. They are learned, with the learning rate of
    the weights, without momentum and without decay."""
    kurtosis: float = 1e-5
    """How much the kurtosis of outputs counts in the loss: λ, times the mean over the tokens of the sum over the
    layers; 0 leaves it out."""
    layers: tuple[str, ...] = ("*",)
    """The layers whose inputs are rounded and whose outputs count, as shell patterns for names of linear layers. Only
    layers inside blocks can be meant; routers and other gates never are."""
    outputs: Literal["all", "residual"] = "all"
    """Whose outputs count: those of `all` these layers, or of those that write to the `residual` stream, such as o_proj
    and down_proj."""

    def __post_init__(self) -> None:
        if self.input_bits is not None and not 2 <= self.input_bits <= 8:
            raise ConfigError(f"input_bits: expected 2 to 8, or null for inputs as they are, got {self.input_bits}")
        if not self.clip > 0:
            raise ConfigError(f"clip: expected more than 0, got {self.clip}")
        if not self.kurtosis >= 0:
            raise ConfigError(f"kurtosis: expected 0 or more, got {self.kurtosis}")
        if not self.layers:
            raise ConfigError("layers: names no layer; for plain training set input_bits: null and kurtosis: 0")

    @property
    def is_off(self) -> bool:
        """Whether a model is trained as if there were no regularization."""
        return self.input_bits is None and self.kurtosis == 0
