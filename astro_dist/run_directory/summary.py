"""summary.json: the figures of a finished run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import DamagedError
from astro.quantization.layer_record import Fallbacks
from astro_dist.run_directory.journal import Damaged, Failed
from astro_dist.run_directory.published_model import PublishedModel
from astro_dist.run_directory.records import read_own_json
from astro_dist.source.model_info import BaseModel

__all__ = ["Perplexity", "RoundFigures", "Summary", "UnitCounts", "read_summary"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity on the held-out text; None where the run has no such text.

    Attributes:
        original: Perplexity of the original model.
        quantized: Perplexity of the result.
    """

    original: float | None
    quantized: float | None


@dataclasses.dataclass(frozen=True)
class RoundFigures:
    """What one round came to.

    Attributes:
        perplexity: Perplexity of the round's result; None where the run has no held-out text.
        mean_relative_error: Mean relative error of the round's layers.
    """

    perplexity: float | None
    mean_relative_error: float


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """How many units there were.

    Attributes:
        blocks: Number of blocks of the model.
        copies: Number of units that copied tensors.
    """

    blocks: int
    copies: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a whole run; wall time and peak memory are those of its last session.

    Attributes:
        perplexity: Perplexity of the original and of the result.
        rounds: What each round came to.
        mean_relative_error: Mean relative error of the last round's layers.
        average_bits: Bits a quantized weight, scales not counted.
        betas: Number of layers solved together that took each strength of the regularization.
        wall_s: Seconds of the last session.
        resumed_units: Number of units that were finished before the last session.
        phases_s: Seconds of all workers together, by phase.
        peak_rss_bytes: Most memory that the driver and each worker ever held.
        bytes_read: Size of the source in bytes.
        bytes_written: Size of the result in bytes.
        fallbacks: Layers of the last round whose result is less than what was asked for.
        retries: Calls that failed and were done again.
        mended: Units that were found damaged and done again.
        notes: What the user should know of the result.
        units: How many units there were.
        model: Folder of the result.
        python: Version of Python.
        base_model: What was quantized.
        publish: Where the model was published; None where it was not.
    """

    perplexity: Perplexity
    rounds: tuple[RoundFigures, ...]
    mean_relative_error: float
    average_bits: float
    betas: Mapping[str, int]
    wall_s: float
    resumed_units: int
    phases_s: Mapping[str, float]
    peak_rss_bytes: Mapping[str, int]
    bytes_read: int
    bytes_written: int
    fallbacks: Fallbacks
    retries: tuple[Failed, ...]
    mended: tuple[Damaged, ...]
    notes: tuple[str, ...]
    units: UnitCounts
    model: str
    python: str
    base_model: BaseModel
    publish: PublishedModel | None = None

    def to_json(self) -> dict[str, Any]:
        """The summary as the JSON object of its file."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        publish = plain.pop("publish")
        return {
            **plain,
            "perplexity": dataclasses.asdict(self.perplexity),
            "rounds": [dataclasses.asdict(figures) for figures in self.rounds],
            "fallbacks": self.fallbacks.to_json(),
            "retries": [retry.to_json() for retry in self.retries],
            "mended": [unit.to_json() for unit in self.mended],
            "notes": list(self.notes),
            "units": dataclasses.asdict(self.units),
            "base_model": self.base_model.to_json(),
            **({"publish": publish.to_json()} if publish is not None else {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object with every field; that of `publish` may be missing.
        """
        fields = (field.name for field in dataclasses.fields(cls))
        read: dict[str, Any] = {
            "perplexity": Perplexity(**content["perplexity"]),
            "rounds": tuple(RoundFigures(**figures) for figures in content["rounds"]),
            "fallbacks": Fallbacks.from_json(content["fallbacks"]),
            "retries": tuple(map(Failed.from_json, content["retries"])),
            "mended": tuple(map(Damaged.from_json, content["mended"])),
            "notes": tuple(content["notes"]),
            "units": UnitCounts(**content["units"]),
            "base_model": BaseModel.from_json(content["base_model"]),
            "publish": PublishedModel.from_json(content["publish"]) if content.get("publish") else None,
        }
        return cls(**{name: read[name] if name in read else content[name] for name in fields})


def read_summary(path: Path) -> Summary:
    """Read the figures of a finished run.

    Args:
        path: File of the summary.

    Raises:
        DamagedError: The file is missing, or not as it was written.
    """
    content = read_own_json(path)
    try:
        return Summary.from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(path, f"it is incomplete ({error!r})") from error
