"""A share of a text on its way through a model, step by step, so that whoever waits for it sees how far it is.

A batch is what passes a block together. How the text is cut into batches depends on nothing but the text and the kind
of device, and every batch is computed by itself. So it changes no figure which batches make up a share, or where it is
measured.
"""

import dataclasses
from collections.abc import Generator, Sequence

import torch

from astro.model.perplexity import measure_sequences
from astro.model.sequence_figures import SequenceFigures
from astro_dist.evaluation.streamed_model import StreamedModel, result_of

__all__ = ["Measured", "measure_here", "pass_share"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What models predicted of the sequences of a share, in their order.

    Attributes:
        sequences: Figures of the model.
        against: Figures of the model that it is compared with; empty where there is none.
        num_readings: Number of times that the model's blocks were read.
        peak_rss_bytes: Largest resident memory of a process that measured, in bytes; 0 for this one.
    """

    sequences: tuple[SequenceFigures, ...]
    against: tuple[SequenceFigures, ...]
    num_readings: int
    peak_rss_bytes: int = 0


def pass_share(
    model: StreamedModel, against: StreamedModel | None, batches: Sequence[torch.Tensor], num_leading: int
) -> Generator[float, None, Measured]:
    """Measure a share of a text, and yield after every block which part of the share is done.

    Args:
        model: The model.
        against: Model with the same tokens to compare with; None for none.
        batches: Tokens, each int64 [B, T].
        num_leading: Number of tokens in front of every sequence that are no text.

    Yields:
        The part that is done, from 0 to 1.

    Returns:
        The figures of all sequences.
    """
    sequences, others = list[SequenceFigures](), list[SequenceFigures]()
    waves = model.waves(batches, copies=2 if against else 1)
    blocks = len(model.skeleton.blocks) + (len(against.skeleton.blocks) if against else 0)
    done, readings = 0, model.num_readings
    for wave in waves:
        hidden_before: list[torch.Tensor] | None = None
        for each in filter(None, (against, model)):
            hidden = yield from _counted(each.pass_blocks(wave), done, blocks * len(waves))
            done += len(each.skeleton.blocks)
            if each is model:
                sequences += _figures(model, wave, hidden, hidden_before, num_leading)
            else:
                others += _figures(each, wave, hidden, None, num_leading)
                hidden_before = hidden
    return Measured(tuple(sequences), tuple(others), model.num_readings - readings)


def measure_here(
    model: StreamedModel, against: StreamedModel | None, batches: Sequence[torch.Tensor], num_leading: int
) -> Measured:
    """Measure a whole text in this process; see `pass_share`."""
    return result_of(pass_share(model, against, batches, num_leading))


def _counted(
    passing: Generator[int, None, list[torch.Tensor]], before: int, total: int
) -> Generator[float, None, list[torch.Tensor]]:
    """Yield the part that is done instead of the number of blocks of one pass."""
    while True:
        try:
            yield (before + next(passing)) / total
        except StopIteration as end:
            hidden: list[torch.Tensor] = end.value
            return hidden


def _figures(
    model: StreamedModel,
    batches: Sequence[torch.Tensor],
    hidden: Sequence[torch.Tensor],
    source_hidden: Sequence[torch.Tensor] | None,
    num_leading: int,
) -> list[SequenceFigures]:
    """Measure the batches of a wave from the last block's outputs."""
    figures: list[SequenceFigures] = []
    with model.head_loaded(), torch.no_grad():
        for number, (ids, states) in enumerate(zip(batches, hidden, strict=True)):
            source = None if source_hidden is None else source_hidden[number].to(model.device)
            ids, states = ids.to(model.device), states.to(model.device)
            figures += measure_sequences(model.skeleton, ids, states, model.num_outputs, source, num_leading)
    return figures
