"""Files that no unfinished unit needs any more, as a schedule reports them.

Only the driver deletes them. A worker that was given up for dead may still be at work on a unit that another worker has
taken over, so a worker must not delete anything.
"""

import dataclasses

__all__ = ["Spent", "SpentInputs", "SpentParts", "SpentShard", "SpentShares"]


@dataclasses.dataclass(frozen=True)
class SpentInputs:
    """The inputs of a block in a stream are not needed any more.

    Attributes:
        block: Index of the block.
        stream: Name of the stream.
    """

    block: int
    stream: str


@dataclasses.dataclass(frozen=True)
class SpentShard:
    """The shard that an earlier round wrote of a block is not needed any more.

    Attributes:
        round_index: Index of the earlier round.
        block: Index of the block.
    """

    round_index: int
    block: int


@dataclasses.dataclass(frozen=True)
class SpentShares:
    """The shares of the Hessians of a batch are not needed any more; only mode `sequential` has them.

    Attributes:
        block: Index of the block.
        batch: Index of the batch.
    """

    block: int
    batch: int


@dataclasses.dataclass(frozen=True)
class SpentParts:
    """The files that workers handed each other to solve a block are not needed any more.

    Attributes:
        round_index: Index of the round.
        block: Index of the block.
    """

    round_index: int
    block: int


Spent = SpentInputs | SpentShard | SpentShares | SpentParts
"""Everything that can be spent."""
