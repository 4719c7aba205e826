"""What a correction of low rank has to make up for where its layer reads rounded inputs.

A server computes Ŵ x̂ + B A x: the layer reads the inputs as they are rounded, x̂, and the correction beside it reads
them as they are, x = x̂ + δ. What is wanted are the outputs W x, so that over the tokens

    ‖W x − Ŵ x̂ − B A x‖² + λ‖W − Ŵ − B A‖² = const + tr((E − B A)(H_x + λI)(E − B A)ᵀ)
    H_x = Σ x xᵀ        E = (Σ (W x − Ŵ x̂) xᵀ + λ(W − Ŵ)) (H_x + λI)⁻¹

and the best B A is found as elsewhere, with H_x in the place of H and E in that of W* − Ŵ. Where nothing is rounded
both are the same. E holds what of the errors of rounding goes with the inputs, which no weight on x̂ can make up for.
H_x and E come from what is summed about x̂, without differences of large sums:

    Σ x̂ xᵀ = H + (Σ δ x̂ᵀ)ᵀ        H_x = Σ x̂ xᵀ + Σ δ xᵀ
    Σ (W x − Ŵ x̂) xᵀ = (W − Ŵ) Σ x̂ xᵀ + W Σ δ xᵀ

Where weights were trained for rounded inputs, W x̂ is wanted in the place of W x. The correction then makes up for what
the weights miss alone, and the last term is none.

Shapes: B input groups side by side, R rows of a layer, C columns.
"""

import dataclasses
from typing import Self

import torch

from astro.linalg.cholesky import Factor, factorize
from astro.linalg.symmetric import mirror_
from astro.quantization.prepared_groups import InputGroups

__all__ = ["UnroundedInputs"]


@dataclasses.dataclass(frozen=True)
class UnroundedInputs:
    """The inputs that corrections read, and what rounding takes from them.

    Attributes:
        H: Weighted mean of xxᵀ, float32 [B, C, C].
        damping: What is added to each diagonal, λ, float32 [B].
    """

    H: torch.Tensor
    damping: torch.Tensor
    _factor: Factor
    _input_groups: InputGroups
    _wants_rounded: bool

    @classmethod
    def of(cls, input_groups: InputGroups) -> Self | None:
        """Put them together from what calibration learned of input groups.

        Args:
            input_groups: The input groups.

        Returns:
            The inputs; None where they are not rounded, or so finely that nothing was summed for corrections.

        Raises:
            NumericalError: Their mean of xxᵀ is zero, or cannot be factored within the damping limit.
        """
        rounding, solver = input_groups.inputs.rounding, input_groups.recipe.solver
        if rounding is None or rounding.drift is None or rounding.correction_drift is None:
            return None
        H = input_groups.H + rounding.correction_drift
        H.add_(rounding.drift.mT)
        mirror_(H)  # both halves are sums of the same numbers, in another order
        in_order = torch.arange(H.shape[-1], device=H.device).expand(H.shape[:-1])
        factor = factorize(H, in_order, solver.damping, solver.max_damping, input_groups.names)
        mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)
        corrections = input_groups.recipe.corrections
        wants_rounded = corrections is not None and corrections.wants_rounded
        return cls(H, factor.damping.float() * mean, factor, input_groups, wants_rounded)

    def missed(self, W: torch.Tensor, W_hat: torch.Tensor) -> torch.Tensor:
        """Return what corrections of some rows have to make up for, E, float32 [B, R, C].

        Args:
            W: The weights whose outputs are wanted, float32 [B, R, C].
            W_hat: The quantized weights, float32 [B, R, C].
        """
        rounding = self._input_groups.inputs.rounding
        assert rounding is not None
        assert rounding.drift is not None
        assert rounding.correction_drift is not None
        D = W - W_hat
        M = D * self.damping[:, None, None]
        terms = [(D, self._input_groups.H), (D, rounding.drift.mT)]
        terms += [] if self._wants_rounded else [(W, rounding.correction_drift)]
        for left, right in terms:
            M.baddbmm_(left, right)
        return self._factor.solve(M)
