"""What a model predicts of a text: its loss, and how far its predictions are from those of the source model."""

import torch
from torch.nn.functional import cross_entropy, log_softmax

from astro.model.recording import run_head
from astro.model.sequence_figures import SequenceFigures
from astro.model.skeleton import Skeleton

__all__ = [
    "gradient_scale",
    "loss_gradient",
    "measure_sequences",
]

_FLOAT16_SCALE = 1024.0
"""Factor of gradients in float16, whose smallest number is large for them. It cancels out of every token's weight."""
_PARTS, _MOST_ROWS = 8, 256
"""Parts in which the distributions of a sequence are compared, and the most tokens of a part. What comparing takes is
then less than the logits, and bounded."""


def measure_sequences(
    skeleton: Skeleton,
    input_ids: torch.Tensor,
    hidden: torch.Tensor,
    num_outputs: int,
    source_hidden: torch.Tensor | None = None,
    num_leading: int = 0,
) -> list[SequenceFigures]:
    """Measure what a model predicts of some sequences.

    Args:
        skeleton: The model, everything outside its blocks loaded.
        input_ids: The tokens of the sequences, int64 [B, T].
        hidden: The output of the last block for them, [B, T, ...].
        num_outputs: Number of values that blocks return as a tuple.
        source_hidden: The same of the source model, [B, T, ...]; None where the model is the source.
        num_leading: Number of tokens in front of every sequence that are no text.
    """
    predicting, predicted = _text_positions(num_leading)
    figures = []
    for i in range(len(hidden)):  # one sequence at a time bounds the logits
        ids = input_ids[i : i + 1]
        logits = run_head(skeleton, ids, hidden[i : i + 1], num_outputs)[0, predicting].float()
        loss = float(cross_entropy(logits, ids[0, predicted], reduction="sum"))
        tokens = len(logits)
        if source_hidden is None:
            figures.append(SequenceFigures(tokens, loss, 0.0, tokens))
            continue
        source = run_head(skeleton, ids, source_hidden[i : i + 1], num_outputs)[0, predicting]
        divergence, agreements = _compare(source, logits)
        figures.append(SequenceFigures(tokens, loss, divergence, agreements))
    return figures


def _text_positions(num_leading: int) -> tuple[slice, slice]:
    """Return the positions that predict a token of the text, and the positions of these tokens."""
    first = max(num_leading, 1)
    return slice(first - 1, -1), slice(first, None)


def _compare(source: torch.Tensor, logits: torch.Tensor) -> tuple[float, int]:
    """Return the sum of KL(source ‖ model) over tokens, and how often both find the same token most likely."""
    divergence = torch.zeros((), dtype=torch.float64, device=logits.device)
    agreements = torch.zeros((), dtype=torch.int64, device=logits.device)
    rows = min(-(-len(logits) // _PARTS), _MOST_ROWS)
    for P, Q in zip(source.split(rows), logits.split(rows), strict=True):
        log_p, log_q = log_softmax(P.float(), -1), log_softmax(Q, -1)
        # A token that the source rules out adds nothing, whatever the model makes of it.
        terms = torch.where(log_p.isneginf(), 0.0, (log_p - log_q) * log_p.exp())
        divergence += terms.sum(dtype=torch.float64)
        agreements += (P.argmax(-1) == Q.argmax(-1)).sum()
    return float(divergence), int(agreements)


def gradient_scale(dtype: torch.dtype) -> float:
    """Return the factor of all gradients of the loss.

    Args:
        dtype: Dtype of the gradients.
    """
    return _FLOAT16_SCALE if dtype == torch.float16 else 1.0


def loss_gradient(
    skeleton: Skeleton, input_ids: torch.Tensor, hidden: torch.Tensor, num_outputs: int, num_leading: int = 0
) -> torch.Tensor:
    """Return the gradient of the loss with respect to the last block's output times `gradient_scale`, [B, T, ...].

    The loss is the negative log-likelihood of each next token of the text, summed over all of these.

    Args:
        skeleton: The model, everything outside its blocks loaded.
        input_ids: The tokens of the sequences, int64 [B, T].
        hidden: The output of the last block for them, [B, T, ...].
        num_outputs: Number of values that blocks return as a tuple.
        num_leading: Number of tokens in front of every sequence that are no text.
    """
    predicting, predicted = _text_positions(num_leading)
    gradients: list[torch.Tensor] = []
    scale = gradient_scale(hidden.dtype)
    for i in range(len(hidden)):  # one sequence at a time bounds the logits
        ids = input_ids[i : i + 1]
        with torch.enable_grad():
            start = hidden[i : i + 1].detach().requires_grad_(True)
            logits = run_head(skeleton, ids, start, num_outputs)[0, predicting].float()
            loss = cross_entropy(logits, ids[0, predicted], reduction="sum")
            gradients += torch.autograd.grad(loss * scale, start)
    return torch.cat(gradients)
