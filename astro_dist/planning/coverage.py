"""How much of a model is quantized, and what is left in 16 bits: by kind in the blocks, by part beside them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from rich.filesize import decimal

from astro_dist.wording import percent

__all__ = ["MULTI_TOKEN", "Coverage"]

MULTI_TOKEN = "multi-token prediction"
"""What the part is called that predicts several tokens at once; servers use it for speculation."""
_FEW = 0.8
"""Share of the blocks' weights below which it is said loudly how much is quantized."""
_NAMED_SHARE = 0.001
"""Share of the blocks' weights from which on a kind that is left is named."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Says which weights are quantized, and which are left as they are.

    Attributes:
        quantized: Number of weights that are quantized.
        in_blocks: Number of all weights of the blocks.
        left: Number of weights that are left as they are, by kind of tensor; experts and blocks are counted together.
        copied_bytes: Size of what lies outside the blocks, in bytes of the result, by part.
    """

    quantized: int
    in_blocks: int
    left: Mapping[str, int]
    copied_bytes: Mapping[str, int]

    @property
    def share(self) -> float:
        """The share of the blocks' weights that is quantized."""
        return self.quantized / self.in_blocks

    @property
    def in_words(self) -> str:
        """Say how much of the blocks is quantized, and what is left."""
        named = {kind: count for kind, count in self.left.items() if count >= _NAMED_SHARE * self.in_blocks}
        ordered = sorted(named, key=lambda kind: (-named[kind], kind))
        kinds = [f"{kind} {percent(named[kind] / self.in_blocks)}" for kind in ordered]
        small = sum(self.left.values()) - sum(named.values())
        kinds += [f"norms and the like {percent(small / self.in_blocks)}"] if small else []
        left = f"; left in 16 bits: {', '.join(kinds)}" if kinds else ""
        return f"quantized {percent(self.share)} of the blocks' weights{left}"

    @property
    def copied_in_words(self) -> str:
        """Say what is copied outside the blocks, with sizes; empty where there is nothing."""
        parts = ", ".join(f"{part} {decimal(size)}" for part, size in self.copied_bytes.items())
        return f"copied as they are: {parts}" if parts else ""

    def notes(self) -> list[str]:
        """Return sentences about what a user may not expect: few quantized weights, and a drafter in 16 bits."""
        notes = []
        if self.share < _FEW:
            notes.append(f"WARNING: only {percent(self.share)} of the blocks' weights are quantized. {self.in_words}")
        if MULTI_TOKEN in self.copied_bytes:
            notes.append(
                f"the layers for {MULTI_TOKEN}, {decimal(self.copied_bytes[MULTI_TOKEN])}, are carried over in 16 "
                "bits; servers load them for speculation, transformers does not build them"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return the coverage as a JSON object."""
        return {**dataclasses.asdict(self), "share": round(self.share, 4)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
