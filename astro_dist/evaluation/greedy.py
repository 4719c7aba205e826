"""Continuations of a text, each token the most likely one.

A model that fits into memory is kept there, and remembers keys and values from token to token. Of a larger one every
new token reads all blocks, for all sequences together.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.token_scores import fill_batches, padded

__all__ = ["greedy_sequences", "greedy_tokens"]


def greedy_tokens(model: StreamedModel, prompt: Sequence[int]) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without end.

    Args:
        model: The model.
        prompt: Tokens of the prompt, at least one.
    """
    if not model.keep_if_it_fits():
        tokens = tuple(prompt)
        while True:
            (token,) = _next_tokens(model, [tokens], len(tokens))
            yield token
            tokens = (*tokens, token)
    ids, memory = torch.tensor([list(prompt)], device=model.device), None
    while True:
        with torch.no_grad():
            output = model.skeleton.text_model(input_ids=ids, past_key_values=memory, use_cache=True)
        memory = output.past_key_values
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        yield int(ids)


def greedy_sequences(
    model: StreamedModel,
    prompts: Sequence[Sequence[int]],
    is_finished: Callable[[int, Sequence[int]], bool],
    batch_tokens: int,
) -> list[list[int]]:
    """Return what follows each prompt, in their order.

    Args:
        model: The model.
        prompts: Tokens of each prompt, at least one.
        is_finished: Function of the number of a prompt and the tokens behind it that tells whether these are enough.
        batch_tokens: Number of tokens that pass through a block together, at least one sequence.
    """
    made: list[list[int]] = [[] for _ in prompts]
    if model.keep_if_it_fits():
        for number, prompt in enumerate(prompts):
            for token in greedy_tokens(model, prompt):
                made[number].append(token)
                if is_finished(number, made[number]):
                    break
        return made
    left = list(range(len(prompts)))
    while left:
        sequences = [(*prompts[number], *made[number]) for number in left]
        for number, token in zip(left, _next_tokens(model, sequences, batch_tokens), strict=True):
            made[number].append(token)
        left = [number for number in left if not is_finished(number, made[number])]
    return made


def _next_tokens(model: StreamedModel, sequences: Sequence[tuple[int, ...]], batch_tokens: int) -> list[int]:
    """Return the token that follows each sequence, by one pass through the blocks for each wave."""
    chosen: dict[tuple[int, ...], int] = {}
    batches = fill_batches(list(dict.fromkeys(sequences)), batch_tokens)
    waiting = iter(batches)
    for wave in model.waves([padded(batch) for batch in batches]):
        hidden = model.last_hidden(wave)
        with model.head_loaded(), torch.no_grad():
            for states in hidden:
                for row, tokens in enumerate(next(waiting)):
                    end = len(tokens)
                    logits = model.logits(torch.tensor([tokens[-1:]]), states[row : row + 1, end - 1 : end])
                    chosen[tokens] = int(logits[0, -1].argmax())
    return [chosen[tokens] for tokens in sequences]
