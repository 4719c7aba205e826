"""What became of the inputs of layers that were to be smoothed, by kind of input."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from astro_dist.run_directory.plain_record import PlainRecord
from astro_dist.wording import counted

if TYPE_CHECKING:  # it loads torch, which those who only read figures need not wait for
    from astro.model.smoothed_tensors import SmoothedInput

__all__ = ["SmoothedKind", "smoothed_kinds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedKind(PlainRecord):
    """Figures of the inputs of one kind in all blocks.

    Attributes:
        name: Last names of the layers that read such an input, joined by '+'.
        into: Last name of the module whose channels became smaller; empty where the inputs stay as they are.
        reason: Why they stay as they are; empty where they do not.
        inputs: Number of such inputs.
        channels: Number of channels of all of them that were scaled.
        largest_factor: Factor that is furthest from 1; 1 where none was scaled.
    """

    name: str
    into: str
    reason: str
    inputs: int
    channels: int
    largest_factor: float

    @property
    def in_words(self) -> str:
        """The kind in words, such as "o_proj into v_proj: 30 inputs, 812 channels, largest factor 16"."""
        if self.reason:
            return f"{self.name}: {counted(self.inputs, 'input')} not smoothed, because {self.reason}"
        scaled = f"{counted(self.channels, 'channel')}, largest factor {self.largest_factor:g}"
        return f"{self.name} into {self.into}: {counted(self.inputs, 'input')}, {scaled}"


def smoothed_kinds(inputs: Iterable["SmoothedInput"]) -> tuple[SmoothedKind, ...]:
    """Count inputs by what reads them, and by what became of them.

    Args:
        inputs: The inputs of all blocks.
    """
    kinds: dict[tuple[str, str, str], list[SmoothedInput]] = {}
    for smoothed in inputs:
        place = (_kind_of(smoothed), smoothed.into.rpartition(".")[2], smoothed.reason)
        kinds.setdefault(place, []).append(smoothed)
    return tuple(
        SmoothedKind(
            name=name,
            into=into,
            reason=reason,
            inputs=len(members),
            channels=sum(len(smoothed.columns.values) for smoothed in members),
            largest_factor=max((s.columns.largest for s in members), key=lambda factor: max(factor, 1 / factor)),
        )
        for (name, into, reason), members in kinds.items()
    )


def _kind_of(smoothed: "SmoothedInput") -> str:
    names = (f"experts.{n.rpartition('.')[2]}" if _is_experts(n) else n.rpartition(".")[2] for n in smoothed.layers)
    return "+".join(names)


def _is_experts(name: str) -> bool:
    from astro.model.experts import experts_of

    return experts_of(name) is not None or name.rpartition(".")[0].endswith("experts")
