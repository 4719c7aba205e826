"""The statistics of one stage of a block, whose inputs hold the errors of the stages before.

Layers that read the same input are an input group. Shapes: C columns (inputs).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from astro.calibration.drift import DriftAccumulator
from astro.calibration.finished_sums import finish_sums_
from astro.calibration.input_sums import InputSums, SumKind
from astro.calibration.starved_experts import AllTokens, InputStatistics
from astro.calibration.token_weights import TokenWeights
from astro.config import Experts
from astro.model.operands import Inputs, Operand
from astro.timing import Stopwatch

__all__ = ["StageStatistics"]


class StageStatistics:
    """Sums the inputs of a stage's layers, and how they drifted from those in the source model.

    Attributes:
        operands: First operand of each input group.
        drifting: Those of them whose drift is summed.
    """

    def __init__(
        self,
        input_groups: Sequence[Sequence[Operand]],
        device: torch.device,
        weights: TokenWeights,
        sum_kind: Callable[[Operand], SumKind],
        in_halves: bool,
    ) -> None:
        """Begin with no statistics.

        Args:
            input_groups: Operands of each input group.
            device: Device of the sums.
            weights: How much each token counts.
            sum_kind: Returns what is summed of an operand's inputs.
            in_halves: Whether drifts are summed over every other chunk apart, so that it can be measured which share of
                them is reproducible.
        """
        self._weights, self._device = weights, device
        self._sums: dict[tuple[Operand, ...], InputSums] = {}
        self._even: dict[Operand, DriftAccumulator] = {}
        for group in map(tuple, input_groups):
            kind, token_weights = sum_kind(group[0]), weights.kind_of(group[0])
            keep_inputs = group[0].expert is not None
            self._sums[group] = InputSums(group[0].columns, device, kind, token_weights, keep_inputs)
            if kind.has_drift and in_halves:
                self._even[group[0]] = DriftAccumulator(group[0].columns, device)
        self.operands = [group[0] for group in self._sums]
        self.drifting = [group[0] for group, sums in self._sums.items() if sums.drift is not None]
        self._watches = {phase: Stopwatch(device) for phase in ("hessian", "compensate")}
        self._num_chunks = 0

    def add_(self, chunk: str, inputs: Mapping[Operand, Inputs], source_inputs: Mapping[Operand, Inputs]) -> None:
        """Add the inputs of one chunk.

        Args:
            chunk: Name of the chunk.
            inputs: What each of `operands` reads; an expert that no token reaches may be left out.
            source_inputs: What those in `drifting` read of the same chunk in the source model.
        """
        is_even = self._num_chunks % 2 == 0
        self._num_chunks += 1
        for (operand, *_), sums in self._sums.items():
            if operand not in inputs:
                continue
            X = inputs[operand].X
            with self._watches["hessian"].running():
                of_tokens = self._weights.of(operand, chunk, inputs[operand])
                rounded = sums.add_(X, of_tokens)
            drift = self._even.get(operand, sums.drift) if is_even else sums.drift
            if drift is not None:
                with self._watches["compensate"].running():
                    drift.add_(source_inputs[operand].X, X, of_tokens, rounded)

    def add_all_(self, passes: Iterable[tuple[str, Mapping[Operand, Inputs], Mapping[Operand, Inputs]]]) -> None:
        """Add the inputs of several chunks; nothing holds those of the last one afterwards.

        Args:
            passes: What `add_` is given for each chunk.
        """
        for chunk, inputs, source_inputs in passes:
            self.add_(chunk, inputs, source_inputs)

    def seconds(self) -> dict[str, float]:
        """Return the time that the sums took, by phase."""
        return {phase: watch.read_s() for phase, watch in self._watches.items()}

    def take_(self, operand: Operand) -> InputSums:
        """Hand out the sums of an input group as they are, without halves.

        Args:
            operand: First operand of the input group.
        """
        return self._sums.pop(next(group for group in self._sums if group[0] == operand))

    def finish_(
        self, experts: Experts, all_tokens: Callable[[Sequence[Operand]], AllTokens]
    ) -> Iterator[InputStatistics]:
        """Yield the statistics of every input group; each is forgotten as soon as it is handed out.

        Args:
            experts: The policy about experts that saw too few tokens.
            all_tokens: Returns what experts would see if all tokens went through them, see `finish_sums_`.

        Raises:
            NumericalError: A layer saw no token, or values that are not finite, or an expert saw too few tokens and the
                policy is `fail`.
        """
        finished = finish_sums_(self._sums, experts, self._weights, all_tokens, self._device)
        for group in list(self._sums):
            spread = self._spread_(group[0], self._sums[group])
            yield replace(next(finished), spread=spread)

    def _spread_(self, operand: Operand, sums: InputSums) -> torch.Tensor | None:
        """Add up the halves of a drift, and return how far they lie apart, if there are halves."""
        even = self._even.pop(operand, None)
        if even is None:
            return None
        assert sums.drift is not None
        sums.drift.absorb_(even)
        # It is needed once, after the Hessian is factored, which takes the device's memory.
        return sums.spread_(even).cpu()
