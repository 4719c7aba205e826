"""What mode `blocks` knows of one block in one round. Pure, as all of the schedule."""

import dataclasses
import enum

from astro_dist.schedule.calls import OpenBlock
from astro_dist.schedule.pending_calls import PendingCalls

__all__ = ["RoundBlock", "State"]


class State(enum.Enum):
    """Where a block is on its way through a round; `BlockSchedule` draws what leads from one to the next."""

    WAITING = "nobody has it in hand"
    OPENING = "a worker reads it"
    FEEDING = "a worker passes chunks through it, and solves or closes it after the last one"
    SPLIT = "no worker has it in hand: its parts are open to all"
    FINISHED = "its unit is finished"


@dataclasses.dataclass
class RoundBlock:
    """One block in one round, or in the pass behind the last round that evaluates the result.

    Attributes:
        round_index: Index of the round; of the pass behind the last round, the number of rounds.
        block: Index of the block.
        evaluates: Whether held-out chunks are measured on it, instead of it being quantized.
        state: Where it is on its way.
        next_chunk: Number of chunks that have passed it while its worker holds it.
        parts: The calls by which workers solve it; None unless it is split.
    """

    round_index: int
    block: int
    evaluates: bool
    state: State = State.WAITING
    next_chunk: int = 0
    parts: PendingCalls | None = None

    @property
    def place(self) -> tuple[int, int]:
        """The round and the block; a block before another one comes first."""
        return self.round_index, self.block

    @property
    def opening(self) -> OpenBlock:
        """The call that it begins with."""
        return OpenBlock(self.round_index, self.block, self.evaluates)

    @property
    def unit(self) -> str:
        """The name of its unit."""
        return self.opening.unit

    def move(self, state: State, parts: PendingCalls | None = None) -> None:
        """Take it from one state to another, where feeding begins anew."""
        self.state, self.next_chunk, self.parts = state, 0, parts
