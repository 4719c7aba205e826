"""A rehearsal of what workers do with a model's blocks, without any of its weights, before a run starts.

All parameters outside the blocks and in the first one are zeros that take no memory: a single one, seen at every place.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from astro.errors import AstroError, UnsupportedError
from astro.model.block_call import BlockState, forward
from astro.model.call_file import require_storable
from astro.model.computed_buffers import fill_buffers
from astro.model.recording import count_outputs, record
from astro.model.skeleton import Skeleton

__all__ = ["rehearse"]

_TOKENS = 8
"""Tokens of the rehearsal; what a block is called with does not hang on their number."""
_CPU = torch.device("cpu")


@torch.no_grad()
def rehearse(skeleton: Skeleton) -> int:
    """Run the first block and record the calls of all, as a run will do, and return the width of the hidden states.

    The width is the number of elements for each token: with hyper-connections, those of all lanes.

    Args:
        skeleton: The model, all of it on the meta device, where it is again afterwards.

    Raises:
        UnsupportedError: The blocks of the model cannot be run one by one.
    """
    input_ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    try:
        with _zeros(skeleton):
            num_outputs = count_outputs(skeleton, input_ids)
            hidden, calls = record(skeleton, input_ids, num_outputs)
            require_storable(calls)
            forward(skeleton.blocks[0], BlockState(hidden), calls[0])
    except AstroError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise UnsupportedError(
            f"{type(skeleton.model).__name__}: its blocks cannot be run one by one: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}. Nothing was started; "
            "try another release of transformers, or report it"
        ) from error
    return hidden.numel() // _TOKENS


@contextlib.contextmanager
def _zeros(skeleton: Skeleton) -> Iterator[None]:
    """Put zeros into the first block and around the blocks while the body of a `with` statement runs."""
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
    for name, module in skeleton.model.named_modules():
        buffers += [(module, key, value) for key, value in module._buffers.items() if value is not None]
        if skeleton.block_of(f"{name}.") in (None, 0) and not skeleton.is_beside_text(name):
            parameters += [(module, key, value) for key, value in module._parameters.items() if value is not None]
    try:
        for module, key, value in parameters:
            zero = torch.zeros((), dtype=value.dtype).expand(value.shape)
            module._parameters[key] = nn.Parameter(zero, requires_grad=False)
        for module, key, buffer in buffers:
            if key not in module._non_persistent_buffers_set:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        fill_buffers(skeleton.model, skeleton.model, _CPU, skeleton.is_beside_text)
        yield
    finally:
        for module, key, value in parameters:
            module._parameters[key] = value
        for module, key, buffer in buffers:
            module._buffers[key] = buffer
