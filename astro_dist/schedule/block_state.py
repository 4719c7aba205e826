"""The state of one block in one round, in mode `blocks`."""

import dataclasses
import enum

from astro_dist.schedule.calls import OpenBlock
from astro_dist.schedule.pending_calls import PendingCalls

__all__ = ["RoundBlock", "State"]


class State(enum.Enum):
    """Says how far a block is in a round. `BlockSchedule` draws what leads from one state to the next."""

    WAITING = "no worker has it open"
    OPENING = "a worker reads it"
    FEEDING = "a worker passes chunks through it, and solves or closes it after the last one"
    SPLIT = "no worker has it open, and any worker may take one of its parts"
    FINISHED = "its unit is finished"


@dataclasses.dataclass
class RoundBlock:
    """Follows one block through one round, or through the pass after the last round, which evaluates the result.

    Attributes:
        round_index: Index of the round; the number of rounds for the pass after the last round.
        block: Index of the block.
        evaluates: Whether the block is only evaluated, not quantized.
        state: State of the block.
        next_chunk: Number of chunks that have passed the block since its worker opened it.
        parts: Calls by which workers solve the block; None unless it is split.
    """

    round_index: int
    block: int
    evaluates: bool
    state: State = State.WAITING
    next_chunk: int = 0
    parts: PendingCalls | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Return the round and the block. Pairs sort in the order in which blocks begin."""
        return self.round_index, self.block

    @property
    def opening(self) -> OpenBlock:
        """Return the call that the block begins with."""
        return OpenBlock(self.round_index, self.block, self.evaluates)

    @property
    def unit(self) -> str:
        """Return the name of the block's unit."""
        return self.opening.unit

    def move(self, state: State, parts: PendingCalls | None = None) -> None:
        """Take the block to another state. Chunks that have passed it do not count any more.

        Args:
            state: State that the block is in from now on.
            parts: Calls that are to be made, where the block is split.
        """
        self.state, self.next_chunk, self.parts = state, 0, parts
