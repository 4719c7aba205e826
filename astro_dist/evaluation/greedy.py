"""Continuations of a text, each token the most likely one.

A model that fits into memory is kept there, and remembers keys and values from token to token. Of a larger one every
new token reads all blocks, for all sequences together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.token_scores import pass_sequences

__all__ = ["greedy_sequences", "greedy_tokens"]

_Enough = Callable[[Sequence[int]], bool]


def greedy_tokens(model: StreamedModel, prompt: Sequence[int], num_tokens: int, is_enough: _Enough) -> list[int]:
    """Return the tokens that follow a prompt.

    Args:
        model: The model.
        prompt: Tokens of the prompt, at least one.
        num_tokens: Largest number of new tokens.
        is_enough: Function of the new tokens that is called after each of them, and tells whether they are enough.
    """
    if model.keep_if_it_fits():
        return _generated(model, prompt, num_tokens, is_enough)
    (made,) = _streamed(model, [prompt], [num_tokens], lambda _, tokens: is_enough(tokens), 1)
    return made


def greedy_sequences(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_enough: Callable[[int, Sequence[int]], bool],
    batch_tokens: int,
) -> list[list[int]]:
    """Return what follows each prompt, in their order.

    Args:
        model: The model.
        prompts: Tokens of each prompt, at least one.
        limits: Largest number of new tokens behind each prompt.
        is_enough: Function of the number of a prompt and the tokens behind it that tells whether these are enough.
        batch_tokens: Number of tokens that pass through a block together, at least one sequence.
    """
    if not model.keep_if_it_fits():
        return _streamed(model, prompts, limits, is_enough, batch_tokens)
    with model.rounding():
        return [
            _generated(model, prompt, limits[number], lambda tokens, number=number: is_enough(number, tokens))  # type: ignore[misc]
            for number, prompt in enumerate(prompts)
        ]


def _generated(model: StreamedModel, prompt: Sequence[int], num_tokens: int, is_enough: _Enough) -> list[int]:
    """Let transformers continue a prompt with the model that is in memory."""
    start = len(prompt)
    asked = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, use_cache=True)

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = [is_enough(row[start:].tolist()) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)

    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.skeleton.text_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=asked,
        stopping_criteria=transformers.StoppingCriteriaList([stop]),
    )
    return [int(token) for token in output[0, start:]]


def _streamed(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    is_enough: Callable[[int, Sequence[int]], bool],
    batch_tokens: int,
) -> list[list[int]]:
    """Continue all prompts together, a token of each for every reading of the model."""
    made: list[list[int]] = [[] for _ in prompts]
    left = [number for number, limit in enumerate(limits) if limit > 0]
    while left:
        sequences = [(*prompts[number], *made[number]) for number in left]
        for number, token in zip(left, _next_tokens(model, sequences, batch_tokens), strict=True):
            made[number].append(token)
        left = [n for n in left if not is_enough(n, made[n]) and len(made[n]) < limits[n]]
    return made


def _next_tokens(model: StreamedModel, sequences: Sequence[tuple[int, ...]], batch_tokens: int) -> list[int]:
    """Return the token that follows each sequence, by one pass through the blocks for each wave."""
    chosen: dict[tuple[int, ...], int] = {}

    def choose(tokens: tuple[int, ...], states: torch.Tensor) -> None:
        logits = model.logits(torch.tensor([tokens[-1:]]), states[:, -1:])
        chosen[tokens] = int(logits[0, -1].argmax())

    pass_sequences(model, list(dict.fromkeys(sequences)), batch_tokens, choose)
    return [chosen[tokens] for tokens in sequences]
