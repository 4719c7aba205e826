"""The section of the configuration on calibration text. The docstring of each key is its reference."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from astro_dist.config.section import Section

__all__ = ["CalibrationConfig", "TextSource"]

_TEXT_KEYS = ("source", "subset", "split", "revision", "column")
"""The keys that say where one text of calibration is."""
_SAMPLES, _HOLDOUT_SAMPLES, _SEQUENCE_LENGTH = 128, 16, 2048
"""What `samples` and `holdout_samples` are where they are left to the text and it has enough."""
_SHARE_TOLERANCE = 0.011
"""How far the sum of shares may be from 1, so that three times 0.33 is right."""


class TextSource(Section):
    """One of the texts that `calibration.sources` mixes."""

    source: str
    """The text: anything that `calibration.source` may name."""
    subset: str | None = None
    """The subset of a dataset on the Hub, as for a single text."""
    split: str = "train"
    """The split of a dataset on the Hub, as for a single text."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the Hub, as for a single text."""
    column: str = "auto"
    """The column with the text or the chats, as for a single text."""
    share: float = Field(gt=0, le=1)
    """The share of all sequences that comes from this text. The shares of all texts add up to 1."""


class CalibrationConfig(Section):
    """The section `calibration` says on which text the statistics are collected, and perplexity is measured."""

    source: str = "python-docs"
    """The text: `python-docs` (the Python language reference that every CPython ships), the path of a .txt, .parquet,
    .jsonl or .jsonl.gz file, or a dataset of the Hub (ORG/NAME), which needs the package `datasets`."""
    subset: str | None = None
    """The subset (configuration) of a dataset on the Hub; where it is not given, the only one or the default one."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """The branch, tag or commit of a dataset on the Hub; where it is not given, `main`. A run keeps the commit that it
    began with, even if the branch moves on."""
    column: str = "auto"
    """The column whose rows are documents: texts, or chats, which the model's own chat template renders. `auto` takes
    the first that is there of `text`, `messages` and `conversations`."""
    sources: tuple[TextSource, ...] = ()
    """Several texts instead of one, each with its share of the sequences."""
    samples: int | Literal["auto"] = "auto"
    """The number of sequences that the statistics are collected on; `auto` is 128, or as many as the text has."""
    sequence_length: Annotated[int, Field(ge=8)] | Literal["auto"] = "auto"
    """The length of each sequence in tokens; `auto` is 2048, or as many as the model has positions."""
    chunk_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """The number of sequences that are computed and sent together. It changes the order of sums, and so the result in
    its last bits. `auto` is the largest of 8, 4, 2 and 1 with which a worker fits into `execution.device_memory_gb`."""
    holdout_samples: int | Literal["auto"] = "auto"
    """The number of held-out sequences on which the perplexity before and after is measured; 0 measures none, and
    `auto` is 16, or as many as the quarter of the text has that is held out."""
    seed: int = Field(0, ge=0)
    """The seed that chooses which sequences of the text are taken."""
    token_weights: Literal["loss", "norm", "none"] = "loss"
    """How much each token counts. `loss` measures it: the root of the energy that the loss's gradient has at a layer's
    outputs, which takes one backward pass of the source model. `norm` gives every token the same energy, for free.
    With `none` all tokens count alike, and the few with massive activations own the statistics."""

    @property
    def settled_chunk_samples(self) -> int:
        """The number of sequences that are computed together, once `auto` is settled by the plan."""
        assert self.chunk_samples != "auto", "the size of chunks is not settled yet"
        return self.chunk_samples

    @property
    def longest_sequence(self) -> int:
        """The length of each sequence in tokens, if the model has so many positions."""
        return _SEQUENCE_LENGTH if self.sequence_length == "auto" else self.sequence_length

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The texts: those of `sources`, or the only one with a share of 1."""
        if self.sources:
            return self.sources
        place = {key: getattr(self, key) for key in _TEXT_KEYS}
        return (TextSource(**place, share=1.0),)

    @property
    def text_in_words(self) -> str:
        """The names of the texts, and whether that is the default because nobody named one."""
        is_default = not {"source", "sources"} & self.model_fields_set
        return " + ".join(text.source for text in self.texts) + (", the default text" if is_default else "")

    @property
    def most_samples(self) -> int:
        """The number of sequences to calibrate on, if the text has so many."""
        return _SAMPLES if self.samples == "auto" else self.samples

    @property
    def most_holdout_samples(self) -> int:
        """The number of held-out sequences, if the text has so many."""
        return _HOLDOUT_SAMPLES if self.holdout_samples == "auto" else self.holdout_samples

    @model_validator(mode="after")
    def _check(self) -> "CalibrationConfig":
        for key, least in (("samples", 1), ("holdout_samples", 0)):
            count = getattr(self, key)
            if count != "auto" and count < least:
                raise ValueError(f"{key}: expected auto or at least {least}, got {count}")
        if self.sources:
            fields = type(self).model_fields
            beside = [key for key in _TEXT_KEYS if getattr(self, key) != fields[key].default]
            if beside:
                raise ValueError(f"{beside[0]}: write it into each of calibration.sources, or leave out the latter")
            total = sum(text.share for text in self.sources)
            if abs(total - 1) > _SHARE_TOLERANCE:
                raise ValueError(f"sources: the shares add up to {total:g}, expected 1")
        return self
