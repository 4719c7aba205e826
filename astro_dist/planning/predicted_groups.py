"""Input groups of a block, predicted before anything runs: layers that read the same input and are solved together.

Headers do not say which layers share an input. Layers of the same module with inputs of equal width are taken to share
it, except attention's output, which is recognized by its name. Layers with learned clips of their own round it
differently, and are not solved together. In a run the forward pass of the block decides.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from astro.linalg.batching import batches
from astro.model.linear_layer import LinearLayer

__all__ = ["PredictedInputGroup", "block_batches", "predicted_input_groups", "stages_of", "together"]

_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj")
"""Last names of the layer that multiplies the output of attention."""


@dataclasses.dataclass(frozen=True)
class PredictedInputGroup:
    """Layers that probably read the same input, or several such input groups of equal shape side by side.

    Attributes:
        rows: Rows of all layers of an input group together.
        columns: Width of the input.
        reach: Share of the tokens that reaches the layers.
        stage: Name that is equal for input groups whose turn comes together, as that of all experts does, and of layers
            that read one input and round it differently.
        count: Number of input groups that are side by side.
    """

    rows: int
    columns: int
    reach: float
    stage: str
    count: int = 1

    @property
    def weights(self) -> float:
        """Number of weights of all input groups."""
        return float(self.count * self.rows * self.columns)

    @property
    def square(self) -> float:
        """Number of elements of the Hessians of all input groups."""
        return float(self.count * self.columns**2)


def predicted_input_groups(linears: Iterable[LinearLayer], expert_share: float) -> list[PredictedInputGroup]:
    """Predict the input groups of a block.

    Args:
        linears: Linear layers of the block.
        expert_share: Share of the tokens that reaches an expert.

    Returns:
        The input groups, in the order of their first layers.
    """
    input_groups: dict[tuple[object, ...], PredictedInputGroup] = {}
    stages: dict[tuple[object, ...], str] = {}
    for linear in linears:
        module, _, suffix = linear.name.rpartition(".")
        same_input = (module, linear.expert, linear.columns, suffix in _ATTENTION_OUTPUTS)
        stage = stages.setdefault(same_input, linear.name) if linear.expert is None else linear.parameter
        key = (*same_input, linear.clips)
        reach = 1.0 if linear.expert is None else expert_share
        input_group = input_groups.get(key, PredictedInputGroup(0, linear.columns, reach, stage))
        input_groups[key] = dataclasses.replace(input_group, rows=input_group.rows + linear.rows)
    return list(input_groups.values())


def together(input_groups: Sequence[PredictedInputGroup], tile_elements: int) -> list[PredictedInputGroup]:
    """Put input groups of equal stage and shape side by side, as they are solved.

    Args:
        input_groups: Input groups of a block.
        tile_elements: Weights of a tile.

    Returns:
        The input groups that are solved together, each with its count.
    """
    batched = []
    for stage in stages_of(input_groups):
        shapes = [(input_groups[i].reach, input_groups[i].rows, input_groups[i].columns) for i in stage]
        for batch in batches(shapes, tile_elements):
            batched.append(dataclasses.replace(input_groups[stage[batch.start]], count=len(batch)))
    return batched


def block_batches(linears: Iterable[LinearLayer], expert_share: float, tile_elements: int) -> list[PredictedInputGroup]:
    """Predict the batches in which the layers of a block are solved: its input groups, side by side.

    Args:
        linears: Linear layers of the block.
        expert_share: Share of the tokens that reaches an expert.
        tile_elements: Weights of a tile.
    """
    return together(predicted_input_groups(linears, expert_share), tile_elements)


def stages_of(input_groups: Sequence[PredictedInputGroup]) -> list[list[int]]:
    """Find the input groups whose turn comes together: a single one, those of one input, or those of all experts.

    Args:
        input_groups: Input groups of a block.

    Returns:
        The indices of the input groups of each stage, in order.
    """
    stages: dict[str, list[int]] = {}
    for index, input_group in enumerate(input_groups):
        stages.setdefault(input_group.stage, []).append(index)
    return list(stages.values())
