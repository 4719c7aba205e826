"""What is recorded of a finished unit: the files that it wrote, and its figures."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from astro.quantization.layer_record import LayerRecord

__all__ = [
    "BlockResult",
    "CopyResult",
    "EmbedResult",
    "EvaluationResult",
    "FileRecord",
    "LossResult",
    "UnitRecord",
    "UnitResult",
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
        """The entry as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object with every field.
        """
        return cls(str(content["name"]), int(content["size_bytes"]), str(content["sha256"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plain:
    """A result whose fields are JSON types already. Fields that a newer version may have added are passed over."""

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object with every field.
        """
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedResult(_Plain):
    """Figures of the unit that makes the hidden states before the first block.

    Attributes:
        compute_dtype: Dtype of forward passes, as torch names it.
        device: Kind of device that computed: "cpu" or "cuda".
    """

    MARK: ClassVar[str] = "compute_dtype"
    compute_dtype: str
    device: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyResult(_Plain):
    """Figures of a unit that copies tensors as they are.

    Attributes:
        bytes_read: Size of the tensors in bytes.
    """

    MARK: ClassVar[str] = "bytes_read"
    bytes_read: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockResult:
    """Figures of a unit that quantizes a block.

    Attributes:
        layers: One record for layers that were solved together.
        seconds: Time by phase.
        host: Name of the machine that wrote the block.
        device: Name of the GPU, or the kind of CPU.
        torch: Version of torch.
        peak_rss_bytes: Most memory that the worker's process ever held.
        peak_device_bytes: Most memory that it ever held on the GPU; 0 without one.
    """

    MARK: ClassVar[str] = "layers"
    layers: tuple[LayerRecord, ...]
    seconds: Mapping[str, float]
    host: str
    device: str
    torch: str
    peak_rss_bytes: int
    peak_device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "layers": [layer.to_json() for layer in self.layers], "seconds": dict(self.seconds)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object with every field.
        """
        plain = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**plain, "layers": tuple(map(LayerRecord.from_json, content["layers"]))})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossResult(_Plain):
    """Figures of a unit that measures the loss on the held-out text.

    Attributes:
        negative_log_likelihood: Sum over all tokens, in nats.
        tokens: Number of tokens that were predicted.
    """

    MARK: ClassVar[str] = "negative_log_likelihood"
    negative_log_likelihood: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult(_Plain):
    """Figures of a unit that takes the held-out chunks through a block of the result.

    Attributes:
        seconds: Time by phase.
    """

    MARK: ClassVar[str] = "seconds"
    seconds: Mapping[str, float]


UnitResult = EmbedResult | CopyResult | BlockResult | LossResult | EvaluationResult
_KINDS: tuple[type[UnitResult], ...] = (EmbedResult, CopyResult, BlockResult, LossResult, EvaluationResult)
"""In the order in which they are looked for: a block's result has seconds too."""


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """The record of a finished unit.

    Attributes:
        unit: Name of the unit.
        key: Identity of the run that the unit belongs to.
        files: Files that the unit wrote.
        result: Figures of the unit.
    """

    unit: str
    key: str
    files: tuple[FileRecord, ...]
    result: UnitResult

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by phase; empty for a unit whose time is not measured."""
        return self.result.seconds if isinstance(self.result, BlockResult | EvaluationResult) else {}

    def to_json(self) -> dict[str, Any]:
        """The record as the JSON object of its file, with its own checksum."""
        content = {
            "unit": self.unit,
            "key": self.key,
            "files": [file.to_json() for file in self.files],
            "result": self.result.to_json(),
        }
        return {**content, "checksum": checksum_of(content)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Args:
            content: JSON object of the record's file.

        Raises:
            ValueError: The checksum is not that of the content, or the figures are of no unit that is known.
            KeyError: A field is missing.
            TypeError: A field is of another kind.
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
    """The checksum of a record, over everything but itself.

    Args:
        content: JSON object of the record, with or without its checksum.

    Returns:
        SHA-256, hex.
    """
    plain = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
