"""The summary of a finished run, which is the content of summary.json."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from astro.errors import DamagedError
from astro.model.sequence_figures import mean_per_token, relative_change
from astro.quantization.layer_record import Fallbacks
from astro_dist.planning.coverage import Coverage
from astro_dist.run_directory.correction_figures import CorrectionFigures
from astro_dist.run_directory.journal import Damaged, Failed
from astro_dist.run_directory.published_model import PublishedModel
from astro_dist.run_directory.records import read_own_json
from astro_dist.run_directory.smoothed_kinds import SmoothedKind
from astro_dist.run_directory.tuning import TuningFigures
from astro_dist.run_directory.unit_record import LossResult
from astro_dist.source.model_info import BaseModel
from astro_dist.wording import nats, percent

__all__ = ["ENOUGH_TOKENS", "Perplexity", "RoundFigures", "Summary", "UnitCounts", "perplexity_of", "read_summary"]


ENOUGH_TOKENS = 1000
"""Number of held-out tokens below which figures say that they are too few."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Holds what was measured on the held-out text; None where the run has none, or version 0.5.0 did not measure it.

    Errors are standard errors over the sequences. Both models saw the same ones.

    Attributes:
        original: Perplexity of the original model.
        quantized: Perplexity of the result.
        tokens: Number of tokens that were predicted.
        change: Relative change of the perplexity.
        change_error: Standard error of the change.
        divergence: Mean KL divergence of the result's next-token distributions from the original's, in nats a token.
        divergence_error: Standard error of the divergence.
        agreement: Share of the tokens at which both models find the same next token most likely.
        agreement_error: Standard error of that share; None in runs of versions before 0.14.0 too.
    """

    original: float | None
    quantized: float | None
    tokens: int | None = None
    change: float | None = None
    change_error: float | None = None
    divergence: float | None = None
    divergence_error: float | None = None
    agreement: float | None = None
    agreement_error: float | None = None

    @property
    def change_in_words(self) -> str:
        """Say how the perplexity changed, such as "+5.2 % ± 1.1"; empty where it is not known."""
        if self.change is None:
            return ""
        error = "" if self.change_error is None else f" ± {100 * self.change_error:.1f}"
        return f"{percent(self.change, 1, signed=True)}{error}"

    @property
    def sample_in_words(self) -> str:
        """Say how many tokens were predicted, and whether they are too few to judge; empty where it is not known."""
        if self.tokens is None:
            return ""
        return f"{self.tokens_in_words}{', too few to judge' if self.tokens < ENOUGH_TOKENS else ''}"

    @property
    def tokens_in_words(self) -> str:
        """Say how many tokens were predicted; empty where it is not known."""
        return "" if self.tokens is None else f"{self.tokens:,} tokens"

    @property
    def divergence_in_words(self) -> str:
        """Say how far the predictions are from the original's; empty where it is not known."""
        if self.divergence is None or self.agreement is None:
            return ""
        error = "" if self.divergence_error is None else f" ± {nats(self.divergence_error)}"
        return (
            f"KL divergence {nats(self.divergence)}{error} nats a token, "
            f"same first choice at {self.agreement_in_words} of the tokens"
        )

    @property
    def agreement_in_words(self) -> str:
        """Say at what share of the tokens both models agree, such as "85.1 % ± 0.6"; empty where it is not known."""
        if self.agreement is None:
            return ""
        error = "" if self.agreement_error is None else f" ± {100 * self.agreement_error:.1f}"
        return f"{percent(self.agreement, 1)}{error}"

    @classmethod
    def of(cls, original: LossResult | None, result: LossResult | None) -> Self:
        """Compare what both models predicted.

        Args:
            original: Figures of the original model; None where the run has no held-out text.
            result: Figures of the result; None where the run has no held-out text.
        """
        plain = cls(perplexity_of(original), perplexity_of(result))
        if original is None or result is None or not original.sequences or not result.sequences:
            return plain
        tokens = [sequence.tokens for sequence in result.sequences]
        before, after = ([sequence.loss for sequence in figures.sequences] for figures in (original, result))
        change = relative_change(before, after, tokens)
        divergence = mean_per_token([sequence.divergence for sequence in result.sequences], tokens)
        agreement = mean_per_token([sequence.agreements for sequence in result.sequences], tokens)
        return dataclasses.replace(
            plain,
            tokens=sum(tokens),
            change=change.value,
            change_error=change.error,
            divergence=divergence.value,
            divergence_error=divergence.error,
            agreement=agreement.value,
            agreement_error=agreement.error,
        )


def perplexity_of(loss: LossResult | None) -> float | None:
    """Return the perplexity of a model; None where there is no held-out text.

    Args:
        loss: Figures of the model on the held-out text.
    """
    # e^700 is near the largest float, and a model of such a perplexity is as bad as one of infinite perplexity.
    return None if loss is None else math.exp(min(loss.negative_log_likelihood / loss.tokens, 700.0))


@dataclasses.dataclass(frozen=True)
class RoundFigures:
    """Holds the figures of one round.

    Attributes:
        perplexity: Perplexity of the round's result; None where the run has no held-out text.
        mean_relative_error: Mean relative error of the round's layers.
    """

    perplexity: float | None
    mean_relative_error: float


@dataclasses.dataclass(frozen=True)
class UnitCounts:
    """Says how many units a run had.

    Attributes:
        blocks: Number of blocks of the model.
        copies: Number of units that copied tensors.
    """

    blocks: int
    copies: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Holds the figures of a whole run. Wall time and peak memory are those of its last session.

    Attributes:
        perplexity: Perplexity of the original and of the result.
        rounds: Figures of each round.
        mean_relative_error: Mean relative error of the last round's layers.
        average_bits: Mean number of bits of a quantized weight, without scales.
        betas: Number of records of layers by the strength β of the regularization that they took.
        wall_s: Length of the last session, in seconds.
        resumed_units: Number of units that were finished before the last session.
        phases_s: Time of all workers together by phase, in seconds.
        peak_rss_bytes: Largest resident memory of the driver and of each worker, in bytes.
        bytes_read: Size of the source, in bytes.
        bytes_written: Size of the result without its corrections, in bytes.
        fallbacks: Layers of the last round that could not be quantized just as the configuration asks.
        retries: Calls that failed and were done again.
        mended: Units that were found damaged and done again.
        notes: Sentences that the user should know about the result.
        units: Numbers of units.
        model: Folder of the result.
        python: Version of Python.
        base_model: Model that was quantized.
        publish: Place where the model was published; None where it was not.
        coverage: What is quantized, and what is left as it is; None in runs of versions that did not count it.
        predicted_divergence: Sum over the last round's layers of the divergence that each is predicted to cause, in
            nats a token; None where the loss's gradient was not measured at all of them.
        widths_by: What `bits: auto` chose widths by, `nats` or `relative error`; empty where widths are configured.
        inputs: What servers are told to round inputs of quantized layers to, such as "int8 per token"; empty where
            inputs stay as they are.
        also_rounded: What servers round besides weights, such as "FP8 cache". All figures of the result are measured
            so.
        smoothing: What became of the inputs that were to be smoothed, by kind; empty where none were.
        corrections: Corrections of low rank in the adapter beside the model, which all figures of the result are
            measured with; None where it has none.
        tuning: What the tuning of scales came to; None where none was asked for.
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
    coverage: Coverage | None = None
    predicted_divergence: float | None = None
    widths_by: str = ""
    inputs: str = ""
    also_rounded: tuple[str, ...] = ()
    smoothing: tuple[SmoothedKind, ...] = ()
    corrections: CorrectionFigures | None = None
    tuning: TuningFigures | None = None

    @property
    def total_bytes(self) -> int:
        """Size of the result together with its corrections, in bytes."""
        return self.bytes_written + (self.corrections.size_bytes if self.corrections is not None else 0)

    @property
    def prediction_in_words(self) -> str:
        """Say what KL divergence was predicted from the errors of the layers; empty where none was."""
        if self.predicted_divergence is None:
            return ""
        before = " before scales were tuned" if self.has_tuned else ""
        return f"predicted from layer errors{before}: {nats(self.predicted_divergence)} nats a token"

    @property
    def has_tuned(self) -> bool:
        """Whether scales were tuned after the errors of layers were measured."""
        return self.tuning is not None and self.tuning.blocks > 0

    def to_json(self) -> dict[str, Any]:
        """Return the summary as the JSON object of its file."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        optional = {name: plain.pop(name) for name in ("corrections", "tuning", "publish")}
        return {
            **plain,
            "perplexity": dataclasses.asdict(self.perplexity),
            "rounds": [dataclasses.asdict(figures) for figures in self.rounds],
            "coverage": self.coverage.to_json() if self.coverage is not None else None,
            "fallbacks": self.fallbacks.to_json(),
            "retries": [retry.to_json() for retry in self.retries],
            "mended": [unit.to_json() for unit in self.mended],
            "notes": list(self.notes),
            "units": dataclasses.asdict(self.units),
            "base_model": self.base_model.to_json(),
            "smoothing": [kind.to_json() for kind in self.smoothing],
            **{name: part.to_json() for name, part in optional.items() if part is not None},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `to_json` returned.

        Args:
            content: JSON object with every field that has no default.
        """
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        fields = [field.name for field in dataclasses.fields(cls) if field.name in required | content.keys()]
        read: dict[str, Any] = {
            "perplexity": Perplexity(**content["perplexity"]),
            "rounds": tuple(RoundFigures(**figures) for figures in content["rounds"]),
            "coverage": Coverage.from_json(content["coverage"]) if content.get("coverage") else None,
            "fallbacks": Fallbacks.from_json(content["fallbacks"]),
            "retries": tuple(map(Failed.from_json, content["retries"])),
            "mended": tuple(map(Damaged.from_json, content["mended"])),
            "notes": tuple(content["notes"]),
            "units": UnitCounts(**content["units"]),
            "base_model": BaseModel.from_json(content["base_model"]),
            "also_rounded": tuple(content.get("also_rounded", ())),
            "smoothing": tuple(map(SmoothedKind.from_json, content.get("smoothing", ()))),
            "corrections": CorrectionFigures.from_json(content["corrections"]) if content.get("corrections") else None,
            "tuning": TuningFigures.from_json(content["tuning"]) if content.get("tuning") else None,
            "publish": PublishedModel.from_json(content["publish"]) if content.get("publish") else None,
        }
        return cls(**{name: read[name] if name in read else content[name] for name in fields})


def read_summary(path: Path) -> Summary:
    """Read the summary of a finished run.

    Args:
        path: Path of the file.

    Raises:
        DamagedError: The file is missing, or is not as it was written.
    """
    content = read_own_json(path)
    try:
        return Summary.from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(path, f"it is incomplete ({error!r})") from error
