"""What is summed of the inputs of a batch, and what the calibration tokens count for in these sums."""

from astro.calibration.input_sums import InputSums, SumKind
from astro.calibration.token_weights import TokenWeights
from astro.model.operands import Operand
from astro_dist.worker.block_recipe import sum_kind
from astro_dist.worker.block_runner import BlockRunner
from astro_dist.worker.split_block import BlockInParts
from astro_dist.worker.token_weigher import read_token_weights

__all__ = ["SummedInputs"]


class SummedInputs:
    """Knows the inputs of blocks that several workers solve. The tokens' weights of one block are kept."""

    def __init__(self, runner: BlockRunner) -> None:
        """Begin without a block.

        Args:
            runner: Runner of the worker's blocks.
        """
        self._runner = runner
        self.forget()

    def forget(self) -> None:
        """Let go of the tokens' weights."""
        self._weights: tuple[BlockInParts, TokenWeights] | None = None

    def operands(self, block: BlockInParts, batch: int) -> list[Operand]:
        """Return the first operand of each input group of a batch.

        Args:
            block: The block.
            batch: Index of the batch.
        """
        by_name = self._runner.layers(block.unit).by_name
        return [by_name[names[0]] for names in block.batches[batch]]

    def kind(self, operand: Operand) -> SumKind:
        """Return what is summed of an input group.

        Args:
            operand: First operand of the input group.
        """
        return sum_kind(self._runner.spec, operand, has_drift=self._runner.spec.quantization.compensates)

    def empty(self, block: BlockInParts, operand: Operand, keep_inputs: bool = True) -> InputSums:
        """Return empty sums for an input group.

        Args:
            block: The block.
            operand: First operand of the input group.
            keep_inputs: Whether an expert's inputs are kept while they are smaller than the sums.

        Raises:
            DamagedError: The file of the tokens' weights is missing, or not as it was written.
        """
        kind, token_weights = self.kind(operand), self.token_weights(block).kind_of(operand)
        keeps = keep_inputs and operand.expert is not None
        return InputSums(operand.columns, self._runner.device, kind, token_weights, keeps)

    def token_weights(self, block: BlockInParts) -> TokenWeights:
        """Return the weights of the calibration tokens at a block's layers, which are read once.

        Args:
            block: The block.

        Raises:
            DamagedError: The file of the weights is missing, or not as it was written.
        """
        if self._weights is None or self._weights[0] is not block:
            self._weights = (block, read_token_weights(self._runner, block.unit))
        return self._weights[1]
