"""The perplexity of a model on a text, and how far it is from that of another model on the same tokens."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from astro.errors import ConfigError, NumericalError
from astro.model.sequence_figures import SequenceFigures, mean_per_token
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_share import Measured, measure_here
from astro_dist.evaluation.text_windows import TextWindows
from astro_dist.run_directory.summary import Perplexity
from astro_dist.run_directory.unit_record import LossResult
from astro_dist.source.text_tokens import require_known

__all__ = ["Measure", "TextLoss", "measure_text"]

Measure = Callable[[StreamedModel, StreamedModel | None, Sequence[torch.Tensor], int], Measured]
"""A function that measures batches: of a model, of one to compare with, and with so many tokens in front that are no
text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLoss:
    """What a model predicts of a text.

    Attributes:
        model: Folder or repository of the model.
        text: Where the text is from.
        window: Number of tokens of a window.
        windows: Number of windows.
        unused_tokens: Number of tokens behind the last window; None where the text was not read to its end.
        leading_tokens: Number of tokens in front of every window that are no text.
        perplexity: Perplexity, of all predicted tokens.
        error: Standard error of the perplexity over the windows; None for a single window.
        against: Folder or repository of the model that it was compared with; None where there was none.
        compared: Perplexities of both, the change and the divergence; None where there was no other model.
        num_readings: Number of times that the model's blocks were read.
        peak_rss_bytes: Largest resident memory of a worker, in bytes; 0 where this process measured.
        wall_s: Time that it took, in seconds.
    """

    model: str
    text: str
    window: int
    windows: int
    unused_tokens: int | None
    leading_tokens: int
    perplexity: float
    error: float | None
    against: str | None
    compared: Perplexity | None
    num_readings: int
    peak_rss_bytes: int
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return dataclasses.asdict(self)


def measure_text(
    model: StreamedModel,
    text: TextWindows,
    batch_tokens: int,
    against: StreamedModel | None,
    measure: Measure = measure_here,
) -> TextLoss:
    """Measure what a model predicts of a text.

    Args:
        model: The model.
        text: Windows of the text.
        batch_tokens: Number of tokens that pass through a block together, at least one window.
        against: Model with the same tokens to compare with, such as the source of a result; None for none.
        measure: Function that measures the batches, in this process or elsewhere.

    Raises:
        ConfigError: A window is longer than the model's positions.
        NumericalError: The loss is not finite.
    """
    begin, length = time.perf_counter(), text.input_ids.shape[1]
    for each in filter(None, (model, against)):
        if each.longest is not None and length > each.longest:
            raise ConfigError(
                f"--window {length}: more than the {each.longest} positions of {each.name}; take shorter windows"
            )
        require_known(int(text.input_ids.max()), each.skeleton.limits()[0], each.name)
    batches = text.input_ids.split(max(batch_tokens // length, 1))
    measured = measure(model, against, batches, text.num_leading)
    loss = _total(model, measured.sequences)
    mean = mean_per_token([each.loss for each in measured.sequences], [each.tokens for each in measured.sequences])
    perplexity = math.exp(min(mean.value, 700.0))  # near the largest float
    return TextLoss(
        model=model.name,
        text=text.source,
        window=length,
        windows=len(text.input_ids),
        unused_tokens=text.unused_tokens,
        leading_tokens=text.num_leading,
        perplexity=perplexity,
        error=None if mean.error is None else perplexity * mean.error,
        against=against.name if against else None,
        compared=Perplexity.of(_total(against, measured.against), loss) if against else None,
        num_readings=measured.num_readings,
        peak_rss_bytes=measured.peak_rss_bytes,
        wall_s=round(time.perf_counter() - begin, 2),
    )


def _total(model: StreamedModel, sequences: Sequence[SequenceFigures]) -> LossResult:
    loss = LossResult.of(sequences)
    if not math.isfinite(loss.negative_log_likelihood):
        raise NumericalError(
            f"{model.name}: its loss on the text is {loss.negative_log_likelihood}; a forward pass overflowed in "
            f"{model.dtype}, or its weights hold NaN: try --dtype float32"
        )
    return loss
