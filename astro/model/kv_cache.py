"""Keys and values of attention as a server's cache holds them: their largest magnitudes, and rounding to FP8.

Transformers hands the keys and values of nearly every architecture to an attention function, behind the rotary
embedding and before heads are repeated: just what a cache holds. This module stands between the two. Latent attention
(MLA) is not among them, because its cache holds something else.
Shapes: B sequences, K heads of keys and values, T tokens, D numbers of a head.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from astro.model.cache_scales import FP8_MAX, CacheScales, LargestCached
from astro.model.gradients import straight_through

__all__ = ["cache_refusal", "caching_modules", "rounded_cache", "watched_cache"]

_Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""A function of an attention module, its keys and its values [B, K, T, D], which returns what takes their place."""


def cache_refusal(model: PreTrainedModel, blocks: Iterable[nn.Module]) -> str | None:
    """Say why the cache of a model cannot be rounded with one scale for each attention module; None where it can.

    Args:
        model: The model, also on the meta device.
        blocks: Its blocks.
    """
    config = model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None) or getattr(config, "compress_rates", None):
        return "its latent attention (such as MLA) caches neither keys nor values, and servers round that otherwise"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers take the keys and values of others, whose cache then has more than one scale"
    if not any(map(caching_modules, blocks)):
        return "its attention is not handed to the attention functions of transformers, where keys and values are seen"
    return None


def caching_modules(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block whose keys and values are seen here.

    Args:
        block: The block, also on the meta device.
    """
    modules = [module for module in block.modules() if "Attention" in type(module).__name__]
    return [module for module in modules if _hands_over(type(module))]


def _hands_over(kind: type[nn.Module]) -> bool:
    """Tell whether a module's forward hands keys and values to the attention functions of transformers."""
    try:
        return "get_interface(" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # made by a program, so that it has no source
        return False


@contextlib.contextmanager
def watched_cache(note: Callable[[nn.Module, LargestCached], None], rounds: bool = False) -> Iterator[None]:
    """Note what attention would cache while the body of a `with` statement runs.

    Args:
        note: Function that gets an attention module and the largest magnitudes of each of its calls.
        rounds: Whether attention computes with rounded keys and values, whose scales are those of the call alone.
    """

    def watch(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = LargestCached(*torch.stack([tensor.detach().abs().amax() for tensor in (key, value)]).tolist())
        note(module, seen)
        if not rounds:
            return key, value
        return _rounded(key, seen.scales.key), _rounded(value, seen.scales.value)

    with _changed(watch):
        yield


@contextlib.contextmanager
def rounded_cache(scales: Mapping[nn.Module, CacheScales]) -> Iterator[None]:
    """Round keys and values as an FP8 cache does while the body of a `with` statement runs.

    Args:
        scales: Scales by attention module; keys and values of others stay as they are.
    """

    def change(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if module not in scales:
            return key, value
        of_module = scales[module]
        return (
            straight_through(key, lambda K: _rounded(K, of_module.key)),
            straight_through(value, lambda V: _rounded(V, of_module.value)),
        )

    with _changed(change) if scales else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _changed(change: _Change) -> Iterator[None]:
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attention = original(self, name, default)

        def attend(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *a: Any, **k: Any
        ) -> Any:
            return attention(module, query, *change(module, key, value), *a, **k)

        return attend

    # A name, so that mypy does not take the function for a method that is replaced by mistake.
    name = "get_interface"
    setattr(AttentionInterface, name, get_interface)
    try:
        yield
    finally:
        setattr(AttentionInterface, name, original)


def _rounded(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """Return what a cache gives back of a tensor: each number the nearest of FP8, times the scale."""
    divided = (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    return (divided.to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)
