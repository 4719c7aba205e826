"""The calls by which workers solve a block together: for each group of layers, or batch of groups side by side, a
decision, then its parts. Pure.
"""

from collections.abc import Mapping

from astro_dist.schedule.calls import Call

__all__ = ["OpenCalls"]


class OpenCalls:
    """What is open of a block's groups.

    Attributes:
        left: calls that can be made or are being made.
        undecided: groups whose decision is not made.
    """

    def __init__(self, place: tuple[int | str, ...], unit: str, groups: Mapping[int, Mapping[str, int]]) -> None:
        """Begin with a decision for each group.

        Args:
            place: round and block.
            unit: the block's name.
            groups: how many calls each takes after its decision, by method; all of one are done before the next begins.
        """
        self._place, self._unit = place, unit
        self._parts = {group: [(method, n) for method, n in parts.items() if n] for group, parts in groups.items()}
        self._running = dict.fromkeys(groups, 1)
        self.left = {Call("decide", (*place, group), unit): None for group in groups}
        self.undecided = len(self.left)

    @property
    def groups(self) -> list[int]:
        """All of them."""
        return list(self._parts)

    def done(self, call: Call) -> None:
        """Take note that a call returned; what it was waited for with opens."""
        del self.left[call]
        self.undecided -= call.method == "decide"
        group = int(call.args[2])
        self._running[group] -= 1
        if not self._running[group] and self._parts[group]:
            method, count = self._parts[group].pop(0)
            self._running[group] = count
            self.left |= {Call(method, (*self._place, group, n), self._unit): None for n in range(count)}
