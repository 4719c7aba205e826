"""The record of a finished unit: the files that it wrote, and its figures."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from astro.errors import RunError
from astro.model.cache_scales import CacheScales
from astro.model.sequence_figures import SequenceFigures
from astro.quantization.layer_record import LayerRecord
from astro_dist.run_directory.plain_record import PlainRecord
from astro_dist.run_directory.tuning import Tuning

if TYPE_CHECKING:  # it loads torch, which those who only read figures need not wait for
    from astro.model.smoothed_tensors import SmoothedInput

__all__ = [
    "BlockResult",
    "CopyResult",
    "EmbedResult",
    "EvaluationResult",
    "FileRecord",
    "LossResult",
    "SmoothingResult",
    "UnitRecord",
    "UnitResult",
    "WeightsResult",
    "checksum_of",
]


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file record describes a file as it was written.

    Attributes:
        name: Path of the file: under the run directory in a unit's record, under the model's folder in its inventory.
        size_bytes: Size of the file in bytes.
        sha256: SHA-256 of the file's bytes, hex.
    """

    name: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        return cls(str(content["name"]), int(content["size_bytes"]), str(content["sha256"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedResult(PlainRecord):
    """Holds the figures of the unit that makes the hidden states before the first block.

    Attributes:
        compute_dtype: Dtype of forward passes, as torch names it, such as "torch.bfloat16".
        device: Kind of device that computed, "cpu" or "cuda".
    """

    MARK: ClassVar[str] = "compute_dtype"
    compute_dtype: str
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyResult(PlainRecord):
    """Holds the figures of a unit that copies tensors as they are.

    Attributes:
        bytes_read: Size of the tensors, in bytes.
    """

    MARK: ClassVar[str] = "bytes_read"
    bytes_read: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockResult:
    """Holds the figures of a unit that quantizes a block.

    Attributes:
        layers: Records of the block's layers, one for all layers that were solved together.
        seconds: Time by phase, in seconds.
        host: Name of the machine that wrote the block.
        device: Name of the GPU, or the kind of CPU.
        torch: Version of torch.
        peak_rss_bytes: Largest resident memory that the worker's process ever had, in bytes.
        peak_device_bytes: Largest memory that the process ever had on the GPU, in bytes; 0 without a GPU.
        cache_scales: Scales of an FP8 cache by the attention module's name in the model; empty where none is rounded,
            None in a record of a version that kept them elsewhere.
        tuning: What came of tuning its scales; None where none was asked for.
    """

    MARK: ClassVar[str] = "layers"
    layers: tuple[LayerRecord, ...]
    seconds: Mapping[str, float]
    host: str
    device: str
    torch: str
    peak_rss_bytes: int
    peak_device_bytes: int
    cache_scales: Mapping[str, CacheScales] | None
    tuning: Tuning | None = None

    def require_cache_scales(self, unit: str) -> Mapping[str, CacheScales]:
        """Return the scales of an FP8 cache.

        Args:
            unit: Name of the unit, for messages.

        Raises:
            RunError: The record does not tell them.
        """
        if self.cache_scales is None:
            raise RunError(
                f"{unit}: its record does not tell the scales of an FP8 cache; another version of astro-dist wrote it. "
                "Go on with that version, or begin anew in another output.dir"
            )
        return self.cache_scales

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layers = [layer.to_json() for layer in self.layers]
        content = {**plain, "layers": layers, "seconds": dict(self.seconds)}
        if self.cache_scales is None:
            del content["cache_scales"]
        else:
            content["cache_scales"] = {name: dataclasses.asdict(each) for name, each in self.cache_scales.items()}
        content["tuning"] = None if self.tuning is None else self.tuning.to_json()
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field; only `cache_scales` and `tuning` may be missing.
        """
        scales: dict[str, CacheScales] | None = None
        if "cache_scales" in content:
            scales = {name: CacheScales(**each) for name, each in content["cache_scales"].items()}
        layers = tuple(map(LayerRecord.from_json, content["layers"]))
        tuning = content.get("tuning")
        read: dict[str, Any] = {
            "layers": layers,
            "cache_scales": scales,
            "tuning": None if tuning is None else Tuning.from_json(tuning),
        }
        plain = {field.name: content[field.name] for field in dataclasses.fields(cls) if field.name not in read}
        return cls(**plain, **read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossResult(PlainRecord):
    """Holds the figures of a unit that measures the loss on the held-out text.

    Attributes:
        negative_log_likelihood: Negative log-likelihood of all tokens together, in nats.
        tokens: Number of tokens that were predicted.
        sequences: Figures of each sequence; none in records of version 0.5.0.
        hidden_errors: Mean relative error of the hidden states behind each block, measured on a few held-out tokens;
            None where no sample is left. Empty for the source model, and in records up to version 0.7.0.
    """

    MARK: ClassVar[str] = "negative_log_likelihood"
    negative_log_likelihood: float
    tokens: int
    sequences: tuple[SequenceFigures, ...] = ()
    hidden_errors: tuple[float | None, ...] = ()

    @classmethod
    def of(cls, sequences: Sequence[SequenceFigures], hidden_errors: Sequence[float | None] = ()) -> Self:
        """Add up the figures of sequences.

        Args:
            sequences: Figures of every held-out sequence.
            hidden_errors: Relative error of the hidden states behind each block.
        """
        total = sum(sequence.loss for sequence in sequences)
        return cls(
            negative_log_likelihood=total,
            tokens=sum(sequence.tokens for sequence in sequences),
            sequences=tuple(sequences),
            hidden_errors=tuple(hidden_errors),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object; only `sequences` and `hidden_errors` may be missing.
        """
        sequences = tuple(SequenceFigures(**sequence) for sequence in content.get("sequences", ()))
        errors = tuple(content.get("hidden_errors", ()))
        return super().from_json({**content, "sequences": sequences, "hidden_errors": errors})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult(PlainRecord):
    """Holds the figures of a unit that takes the held-out chunks through a block of the result.

    Attributes:
        seconds: Time by phase, in seconds.
    """

    MARK: ClassVar[str] = "seconds"
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsResult(PlainRecord):
    """Holds the figures of a unit that weighs the calibration tokens for a block, by the loss.

    Attributes:
        effective_tokens: Number of tokens of equal weight that would say as much, by the name of the first layer of
            each input group that was measured.
        reason: Why some or all input groups were not measured, so that their tokens are weighted by their norm; empty
            where all were.
        seconds: Time by phase, in seconds.
    """

    MARK: ClassVar[str] = "effective_tokens"
    effective_tokens: Mapping[str, float]
    reason: str
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothingResult(PlainRecord):
    """Holds how the inputs of a block's layers are smoothed. Workers read it whenever they load the block.

    Attributes:
        smoothed_inputs: Every input of quantized layers, smoothed or not.
        checked_in: Dtype in which the block was compared with its smoothed form, as torch names it.
        largest_change: Largest difference between what both return, relative to the largest value.
        seconds: Time by phase, in seconds.
    """

    MARK: ClassVar[str] = "smoothed_inputs"
    smoothed_inputs: "tuple[SmoothedInput, ...]"
    checked_in: str
    largest_change: float
    seconds: Mapping[str, float]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field.
        """
        from astro.model.smoothed_tensors import SmoothedInput

        inputs = tuple(map(SmoothedInput.from_json, content["smoothed_inputs"]))
        return super().from_json({**content, "smoothed_inputs": inputs})


UnitResult = EmbedResult | CopyResult | BlockResult | LossResult | WeightsResult | EvaluationResult | SmoothingResult
_KINDS: tuple[type[UnitResult], ...] = (
    EmbedResult,
    CopyResult,
    BlockResult,
    LossResult,
    WeightsResult,
    SmoothingResult,
    EvaluationResult,
)
"""The kinds of results. `MARK` tells the first from the others that fits: a block's result has seconds too."""


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """Records that a unit is finished.

    Attributes:
        unit: Name of the unit.
        key: Key of the run that the unit belongs to; see `Identity`.
        files: Files that the unit wrote.
        result: Figures of the unit.
    """

    unit: str
    key: str
    files: tuple[FileRecord, ...]
    result: UnitResult

    @property
    def seconds(self) -> Mapping[str, float]:
        """Return the time by phase, in seconds. It is empty for a unit whose time is not measured."""
        timed = BlockResult | WeightsResult | EvaluationResult | SmoothingResult
        return self.result.seconds if isinstance(self.result, timed) else {}

    def to_json(self) -> dict[str, Any]:
        """Return the record as the JSON object of its file, with its checksum."""
        content = {
            "unit": self.unit,
            "key": self.key,
            "files": [file.to_json() for file in self.files],
            "result": self.result.to_json(),
        }
        return {**content, "checksum": checksum_of(content)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object of the record's file.

        Raises:
            ValueError: The checksum does not fit the content, or the figures are of no known kind of unit.
            KeyError: A field is missing.
            TypeError: A field has another type.
        """
        if content["checksum"] != checksum_of(content):
            raise ValueError("its checksum is wrong")
        result = content["result"]
        kind = next((kind for kind in _KINDS if kind.MARK in result), None)
        if kind is None:
            raise ValueError("its figures are of no unit that is known")
        files = tuple(map(FileRecord.from_json, content["files"]))
        return cls(str(content["unit"]), str(content["key"]), files, kind.from_json(result))


def checksum_of(content: Mapping[str, Any]) -> str:
    """Compute the checksum of a record over everything but the checksum.

    Args:
        content: JSON object of the record, with or without its checksum.

    Returns:
        The SHA-256, in hex.
    """
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
