"""How likely a model finds given tokens behind others, for many sequences that share one pass through the blocks."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from astro.errors import NumericalError
from astro_dist.evaluation.streamed_model import StreamedModel

__all__ = ["Continuation", "Score", "fill_batches", "pass_sequences", "score_continuations"]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens whose likelihood is asked for, and those before them.

    Attributes:
        tokens: All tokens of the sequence.
        num_scored: Number of tokens at its end whose likelihood is asked for.
    """

    tokens: tuple[int, ...]
    num_scored: int


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model says of a continuation.

    Attributes:
        log_likelihood: Logarithm of the probability of the scored tokens together, in nats.
        is_greedy: Whether each of them is the most likely one at its place.
    """

    log_likelihood: float
    is_greedy: bool


def score_continuations(model: StreamedModel, asked: Sequence[Continuation], batch_tokens: int) -> list[Score]:
    """Return the score of each continuation, in their order.

    What the model reads is run once where several continuations ask for it, such as one-letter answers to one question.

    Args:
        model: The model.
        asked: The continuations.
        batch_tokens: Number of tokens that pass through a block together, at least one sequence.

    Raises:
        NumericalError: A score is not a number.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(asked):
        by_input.setdefault(continuation.tokens[:-1], []).append(number)
    scores: dict[int, Score] = {}

    def score(tokens: tuple[int, ...], states: torch.Tensor) -> None:
        numbers = by_input[tokens]
        start = len(tokens) - max(asked[number].num_scored for number in numbers)
        logits = model.logits(torch.tensor([tokens[start:]]), states[:, start:])[0]
        scores.update({number: _score(asked[number], logits) for number in numbers})

    pass_sequences(model, list(by_input), batch_tokens, score)
    return [scores[number] for number in range(len(asked))]


def pass_sequences(
    model: StreamedModel,
    sequences: Sequence[tuple[int, ...]],
    batch_tokens: int,
    judge: Callable[[tuple[int, ...], torch.Tensor], None],
) -> None:
    """Pass sequences through all blocks, those of about the same length together.

    Args:
        model: The model.
        sequences: Tokens of each sequence, no two alike.
        batch_tokens: Number of tokens that pass through a block together, at least one sequence.
        judge: Function that is called with the tokens of each sequence and its last hidden states [1, T, ...], while
            the head is loaded.
    """
    batches = fill_batches(sequences, batch_tokens)
    waiting = iter(batches)
    for wave in model.waves([_padded(batch) for batch in batches]):
        hidden = model.last_hidden(wave)
        with model.head_loaded(), torch.no_grad():
            for states in hidden:
                for row, tokens in enumerate(next(waiting)):
                    judge(tokens, states[row : row + 1, : len(tokens)])


def fill_batches(sequences: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Put sequences of about the same length together, the longest first.

    Args:
        sequences: Tokens of each sequence.
        batch_tokens: Largest number of tokens of a batch, unless a single sequence is longer.
    """
    batches: list[list[tuple[int, ...]]] = []
    for sequence in sorted(sequences, key=lambda tokens: (-len(tokens), tokens)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def _padded(batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Sequences as one tensor, int64 [B, T]; the shorter ones are filled up behind their end."""
    length = max(map(len, batch))
    # A token that the sequence has anyway means nothing special to any model.
    return torch.tensor([[*tokens, *tokens[-1:] * (length - len(tokens))] for tokens in batch])


def _score(continuation: Continuation, logits: torch.Tensor) -> Score:
    """Score a continuation by the logits that predict its last tokens, float32 [at least num_scored, V]."""
    targets = torch.tensor(continuation.tokens[-continuation.num_scored :], device=logits.device)
    logits = logits[-continuation.num_scored :]
    likelihoods = logits.log_softmax(-1).gather(-1, targets[:, None])
    total = float(likelihoods.sum())
    if total != total:
        raise NumericalError("a likelihood is not a number; a forward pass overflowed: try --dtype float32")
    return Score(total, bool((logits.argmax(-1) == targets).all()))
