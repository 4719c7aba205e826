"""What calls cost: floating-point operations, from the plan alone. Pure."""

import dataclasses

from astro.config import Quantization, Regularizer
from astro_dist.plan import BlockUnit, Plan
from astro_dist.schedule import Call

__all__ = ["CostModel"]

_NEWTON_PASSES = 5
_BETA_CANDIDATES = 6
_BETA_ROW_SHARE = 1 / 8


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Floating-point operations of each call. A product of [m, k] and [k, n] counts 2 m k n.

    Attributes:
        plan: of the run.
        quantization: of the run.
        regularization: of the run.
        chunk_tokens: tokens of the largest chunk.
        num_tokens: calibration tokens.
        shares: of the calibration chunks in mode `sequential`.
    """

    plan: Plan
    quantization: Quantization
    regularization: Regularizer
    chunk_tokens: int
    num_tokens: int
    shares: int

    def operations(self, call: Call) -> float:
        """Operations of a call; attention's products of queries and keys are not counted."""
        if call.method in ("embed", "head"):
            return 2.0 * self.num_tokens * self.plan.outside_weights
        if call.method in ("copy", "open_block"):
            return 0.0
        unit = self.plan.blocks[int(call.args[1] if call.method in ("forward", "solve", "pass_on") else call.args[0])]
        if call.method == "forward":
            return self.forward(unit, self.chunk_tokens) + self.hessians(unit, self.chunk_tokens)
        if call.method == "pass_on":
            return self.forward(unit, self.chunk_tokens)
        if call.method == "advance":
            return self.forward(unit, self.num_tokens)
        if call.method == "share":
            tokens = -(-self.num_tokens // self.shares)
            return 2 * self.forward(unit, tokens) + 2 * self.hessians(unit, tokens)
        return self.solve(unit)

    def forward(self, unit: BlockUnit, tokens: int) -> float:
        """Of a block's linear layers on some tokens."""
        return 2.0 * tokens * sum(linear.rows * linear.columns for linear in unit.linears)

    def hessians(self, unit: BlockUnit, tokens: int) -> float:
        """Of the Hessians: XᵀX as a symmetric product, once for every width of input. Layers that share their input
        are not known from headers, so that layers of one width count as one, and twice for safety.
        """
        return 2.0 * tokens * sum(columns**2 for columns in {linear.columns for linear in unit.linears})

    def solve(self, unit: BlockUnit) -> float:
        """Of factorization, regularization with its search, GPTQ and refinement of a block."""
        settings, regularization = self.quantization, self.regularization
        iterations = regularization.iterations or (6 if regularization.solver == "admm" else 200)
        passes = 1 + 2 * settings.refine_passes
        regularized = iterations if regularization.name != "none" else 0
        share = 1.0
        if regularized and regularization.beta == "auto":
            share += _BETA_CANDIDATES * _BETA_ROW_SHARE
        solved = sum(2.0 * linear.rows * linear.columns**2 for linear in unit.linears) * (passes + regularized) * share
        return solved + sum(3.0 * columns**3 for columns in {linear.columns for linear in unit.linears})
