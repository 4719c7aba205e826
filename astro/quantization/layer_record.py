"""What is recorded of the layers that were solved together, and what of that is a step down."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self

from astro.quantization.predicted_divergence import predicted_divergence

__all__ = ["Fallbacks", "LayerRecord", "predicted_nats"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """Figures of linear layers that read the same input and were solved together."""

    name: str
    """Module names of the layers, joined by '+'."""
    bits: int
    rows: int
    columns: int
    group_size: int
    num_tokens: int
    """Calibration tokens in the Hessian."""
    routed_tokens: int
    """Calibration tokens that the model itself sends through these layers; fewer than all for experts."""
    fallback: str
    """The experts' policy where too few tokens were routed to an expert, else empty."""
    token_weights: str = "none"
    """What the calibration tokens were weighted by: `loss`, `norm`, or `none` where all count alike."""
    relative_error: float
    """‖ŴX̂ − WX‖² / ‖WX‖² on the weighted calibration tokens. X̂ are the inputs X as servers round them, or X itself
    where inputs stay as they are. W are the original weights, or where earlier errors are compensated the weights that
    do so. With rounded inputs it is measured on a sample of the tokens, see `output_error`, where each counts with the
    square of its weight if that is by the loss, see `predicted_divergence`. Where the layers have corrections of low
    rank, Ŵ is with them. Where scales are tuned, Ŵ has those from before."""
    solved_error: float | None = None
    """The same without corrections; None where the layers have none."""
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank of the correction of each layer that has one, by its name."""
    correction_weights: int = 0
    """Weights of these corrections, which is also the number of multiplications that they take a token."""
    output_energy: float = 0.0
    """‖WX‖², what the error is relative to: a weighted mean over tokens, summed over outputs."""
    gradient_energy: float | None = None
    """Energy of the loss's gradient at the layers' outputs, see `typical_energy`; None where it was not measured."""
    beta: float
    """Strength of the regularization; 0 where none was done."""
    beta_gain: float
    """Share of the sampled rows' layer error before refinement that beta saved against 0; 0 where not searched."""
    width_errors: dict[int, float]
    """Relative error of the sampled rows at each width that was measured, without regularization."""
    group_maximum_ratio: float
    """Mean group maximum after regularization over before; 1 without a regularizer."""
    compensation: float = 0.0
    """Share of the errors made before the layers that their weights make up for; 0 where none is."""
    damping: float
    """Share of the mean diagonal that the Hessian needed; 0 where no factorization was done."""
    factorizations: int
    """Factorizations tried; more than 1 means that the damping was raised. 0 where none was done."""
    seconds: dict[str, float]
    """Time by phase: factor, compensate, beta, regularize, grid, gptq, refine, widths, reconstruct."""

    @property
    def members(self) -> list[str]:
        """Module names of the layers that were solved together."""
        return self.name.split("+")

    @property
    def kind(self) -> str:
        """What layers of every block have in common: their last names, and whether they are an expert's."""
        last = "+".join(member.rpartition(".")[2] for member in self.members)
        return f"experts: {last}" if ".experts." in self.name else last

    @property
    def num_weights(self) -> int:
        """Number of weights of all members."""
        return self.rows * self.columns

    @property
    def nats_per_error(self) -> float | None:
        """Divergence that a relative error of 1 is predicted to cause, in nats a token; None where it is not known.

        Where no token says anything of a layer's inputs, its error is not that of its outputs.
        """
        if self.gradient_energy is None or not self.num_tokens:
            return None
        return predicted_divergence(self.gradient_energy, self.output_energy)

    @property
    def predicted_nats(self) -> float | None:
        """Divergence that the layers are predicted to cause, in nats a token; None where it is not known."""
        return None if self.nats_per_error is None else self.nats_per_error * self.relative_error

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object; widths become text, as every key of JSON is."""
        return {**dataclasses.asdict(self), "width_errors": {str(b): error for b, error in self.width_errors.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        return cls(**{**content, "width_errors": {int(b): error for b, error in content["width_errors"].items()}})


def predicted_nats(layers: Iterable[LayerRecord]) -> float | None:
    """Return the divergence that some layers together are predicted to cause, in nats a token.

    Args:
        layers: Records of the layers. Those that no calibration token reaches are left out.

    Returns:
        The sum; None where it is not known of all of them.
    """
    nats = [layer.predicted_nats for layer in layers if layer.num_tokens]
    return None if None in nats else sum(filter(None, nats))


@dataclasses.dataclass(frozen=True)
class Fallbacks:
    """Layers whose result is less than what was asked for.

    Attributes:
        damping_raised: Names of the layers whose Hessian needed more damping than configured.
        experts: Names of experts' layers that too few tokens reached, by the policy that was used for them.
    """

    damping_raised: tuple[str, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, layers: Iterable[LayerRecord]) -> Self:
        """Collect the fallbacks of some layers.

        Args:
            layers: Their records.
        """
        raised: list[str] = []
        experts: dict[str, tuple[str, ...]] = {}
        for layer in layers:
            if layer.factorizations > 1:
                raised.append(layer.name)
            if layer.fallback:
                experts[layer.fallback] = (*experts.get(layer.fallback, ()), layer.name)
        return cls(tuple(raised), experts)

    def to_json(self) -> dict[str, Any]:
        """Return the fallbacks as a JSON object."""
        experts = {policy: list(names) for policy, names in self.experts.items()}
        return {"damping_raised": list(self.damping_raised), "experts": experts}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        experts = {policy: tuple(names) for policy, names in content["experts"].items()}
        return cls(tuple(content["damping_raised"]), experts)
