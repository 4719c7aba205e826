"""The loss that a perplexity is made of: the negative log-likelihood of each token, given those before it."""

import torch

from astro.model.block_call import run_head
from astro.model.skeleton import Skeleton

__all__ = ["loss_gradient", "sequence_losses"]

_FLOAT16_SCALE = 1024.0
"""Factor of gradients in float16, whose smallest number is large for them. It cancels out of every weight."""


def sequence_losses(skeleton: Skeleton, input_ids: torch.Tensor, hidden: torch.Tensor, as_tuple: bool) -> list[float]:
    """Measure how well a model predicts each of some sequences.

    Args:
        skeleton: The model, everything outside its blocks loaded.
        input_ids: The tokens of the sequences, int64 [B, T].
        hidden: The output of the last block for them, [B, T, H].
        as_tuple: Whether blocks return a tuple.

    Returns:
        The negative log-likelihood of each sequence in nats, summed over all of its tokens but the first: T − 1.
    """
    losses = []
    for i in range(len(hidden)):  # one sequence at a time bounds the logits
        ids = input_ids[i : i + 1]
        logits = run_head(skeleton, ids, hidden[i : i + 1], as_tuple)[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return losses


def loss_gradient(skeleton: Skeleton, input_ids: torch.Tensor, hidden: torch.Tensor, as_tuple: bool) -> torch.Tensor:
    """Return the gradient of the loss with respect to the last block's output, [B, T, H].

    The loss is the negative log-likelihood of each next token of the text, summed over all tokens.

    Args:
        skeleton: The model, everything outside its blocks loaded.
        input_ids: The tokens of the sequences, int64 [B, T].
        hidden: The output of the last block for them, [B, T, H].
        as_tuple: Whether blocks return a tuple.
    """
    gradients: list[torch.Tensor] = []
    scale = _FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
    for i in range(len(hidden)):  # one sequence at a time bounds the logits
        ids = input_ids[i : i + 1]
        with torch.enable_grad():
            start = hidden[i : i + 1].detach().requires_grad_(True)
            logits = run_head(skeleton, ids, start, as_tuple)[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            gradients += torch.autograd.grad(loss * scale, start)
    return torch.cat(gradients)
