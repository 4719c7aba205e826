"""Which linear layers of a block are taken to share an input, and to be solved together, before anything runs.

That is not known from headers: layers of one module with inputs of one width are taken to, but for attention's output,
which goes by its name. In a run the block's own forward decides.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from astro.linalg.batching import batches
from astro.model.linear_layer import LinearLayer

__all__ = ["LayerGroup", "layer_groups", "stages_of", "together"]

_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "c_proj")


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that read one input, or as many such groups of one shape side by side.

    Attributes:
        rows: of all layers of a group together.
        columns: width of the input.
        reach: share of the tokens that reaches them.
        stage: what is the same for groups that come to their turn together, as those of all experts do.
        count: of the groups.
    """

    rows: int
    columns: int
    reach: float
    stage: str
    count: int = 1

    @property
    def weights(self) -> float:
        """Of all groups."""
        return float(self.count * self.rows * self.columns)

    @property
    def square(self) -> float:
        """Elements of all Hessians."""
        return float(self.count * self.columns**2)


def layer_groups(linears: Iterable[LinearLayer], expert_share: float) -> list[LayerGroup]:
    """The groups of a block, in the order of their first layers.

    Args:
        linears: of the block.
        expert_share: share of the tokens that reaches an expert.
    """
    found: dict[tuple[str, int | None, int, bool], LayerGroup] = {}
    for linear in linears:
        module, _, own = linear.name.rpartition(".")
        stage = linear.name if linear.expert is None else linear.parameter
        key = (module, linear.expert, linear.columns, own in _ATTENTION_OUTPUTS)
        reach = 1.0 if linear.expert is None else expert_share
        group = found.get(key, LayerGroup(0, linear.columns, reach, stage))
        found[key] = dataclasses.replace(group, rows=group.rows + linear.rows)
    return list(found.values())


def together(groups: Sequence[LayerGroup], device_type: str) -> list[LayerGroup]:
    """Groups as they are solved: those of one stage and shape side by side.

    Args:
        groups: of a block.
        device_type: "cpu" or "cuda".
    """
    found = []
    for stage in stages_of(groups):
        shapes = [(groups[i].reach, groups[i].rows, groups[i].columns) for i in stage]
        for batch in batches(shapes, device_type):
            found.append(dataclasses.replace(groups[stage[batch.start]], count=len(batch)))
    return found


def stages_of(groups: Sequence[LayerGroup]) -> list[list[int]]:
    """Indices of the groups that come to their turn together: one, or those of all experts."""
    stages: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        stages.setdefault(group.stage, []).append(index)
    return list(stages.values())
