"""What the corrections of low rank of a finished run are, take and leave."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Self

from rich.filesize import decimal

from astro.quantization.layer_record import LayerRecord
from astro_dist.run_directory.plain_record import PlainRecord
from astro_dist.wording import counted, percent

__all__ = ["CorrectionFigures"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionFigures(PlainRecord):
    """Holds the figures of a run's adapter.

    Attributes:
        layers: Number of layers that have a correction.
        least_rank: Smallest rank of a correction.
        largest_rank: Largest rank of a correction.
        weights: Weights of all corrections, which is also the number of multiplications that they take a token.
        layer_weights: Weights of the input groups that are corrected.
        size_bytes: Size of the adapter's weights in bytes.
        error_before: Mean relative error of these input groups without the corrections.
        error_after: Mean relative error of these input groups with them.
    """

    layers: int
    least_rank: int
    largest_rank: int
    weights: int
    layer_weights: int
    size_bytes: int
    error_before: float
    error_after: float

    @classmethod
    def of(cls, records: Iterable[LayerRecord], size_bytes: int) -> Self | None:
        """Add up the figures of layers.

        Args:
            records: Records of the layers of the last round.
            size_bytes: Size of the adapter's weights in bytes.

        Returns:
            The figures; None where no layer has a correction.
        """
        corrected = [record for record in records if record.ranks]
        ranks = [rank for record in corrected for rank in record.ranks.values()]
        if not ranks:
            return None
        return cls(
            layers=len(ranks),
            least_rank=min(ranks),
            largest_rank=max(ranks),
            weights=sum(record.correction_weights for record in corrected),
            layer_weights=sum(record.num_weights for record in corrected),
            size_bytes=size_bytes,
            error_before=statistics.mean(record.solved_error or 0.0 for record in corrected),
            error_after=statistics.mean(record.relative_error for record in corrected),
        )

    @property
    def ranks_in_words(self) -> str:
        """Say what ranks the corrections have, such as "16 to 64"."""
        least, largest = self.least_rank, self.largest_rank
        return str(largest) if least == largest else f"{least} to {largest}"

    @property
    def in_words(self) -> str:
        """Say what the corrections are, take and leave."""
        more = percent(self.weights / self.layer_weights, 1)
        return (
            f"corrections of rank {self.ranks_in_words} beside {counted(self.layers, 'layer')}: "
            f"{decimal(self.size_bytes)}, {more} more multiplications a token in these layers, whose mean relative "
            f"error went from {self.error_before:.3g} to {self.error_after:.3g}"
        )
