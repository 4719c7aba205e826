"""Attention that saves memory on GPUs: the same results, without grouped heads in float32, in one order back."""

import contextlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

from astro.model.attention import SavingAttention, _node_of_attention, saved_memory
from astro.model.gradients import gradients
from tests.support.devices import here


class Calls(TorchFunctionMode):
    """Takes note of what attention is called with."""

    def __init__(self):
        super().__init__()
        self.heads, self.is_grouped = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is attention:
            self.heads.append((args[1] if args else kwargs["key"]).shape[1])
            self.is_grouped.append(kwargs.get("enable_gqa", False))
        return func(*args, **kwargs)


def grouped_heads(dtype):
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, 16, 8, generator=generator).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_float32_has_a_key_for_every_query_and_the_same_result(dtype, heads):
    Q, K, V = grouped_heads(dtype)
    expected = attention(Q, K, V, is_causal=True, enable_gqa=True)
    with Calls() as calls, SavingAttention():
        positional = attention(Q, K, V, None, 0.0, True, enable_gqa=True)
        named = attention(query=Q, key=K, value=V, is_causal=True, enable_gqa=True)
    assert (calls.heads, calls.is_grouped) == ([heads] * 2, [heads == 2] * 2)
    torch.testing.assert_close(positional, expected)
    torch.testing.assert_close(named, expected)


def test_other_arguments_reach_attention():
    Q, _, _ = grouped_heads(torch.float32)
    mask = torch.rand(16, 16) < 0.7
    with SavingAttention():
        assert torch.equal(attention(Q, Q, Q, mask, scale=0.3), attention(Q, Q, Q, attn_mask=mask, scale=0.3))


def test_only_the_backward_pass_of_attention_raises_where_it_has_no_order():
    Q = grouped_heads(torch.float32)[0].requires_grad_()
    warns_only = {}

    def note(name):
        return lambda *_: warns_only.update({name: torch.is_deterministic_algorithms_warn_only_enabled()})

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with SavingAttention():
            scaled = Q * 2
            output = attention(scaled, scaled, scaled)
            result = output * 2
        for name, node in {"before": result.grad_fn, "attention": output.grad_fn, "behind": scaled.grad_fn}.items():
            node.register_prehook(note(name))
        result.sum().backward()
        assert warns_only == {"before": True, "attention": False, "behind": True}
    finally:
        torch.use_deterministic_algorithms(False)


def test_attention_is_found_behind_what_cuts_off_its_padding():
    """As torch does on a GPU where a head has another size than a multiple of 8."""
    Q = grouped_heads(torch.float32)[0].requires_grad_()
    output = attention(Q, Q, Q)
    assert "Attention" in output.grad_fn.name()
    assert _node_of_attention(output[..., :6].transpose(1, 2).grad_fn) is output.grad_fn
    other = (Q * 2).grad_fn
    assert _node_of_attention(other) is other


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_gradients_of_attention_are_right_and_have_the_same_bits_twice(dtype, tolerance):
    heads = [torch.randn(1, count, 192, 64) for count in (8, 2, 2)]
    wanted = torch.randn(1, 8, 192, 64)

    def found(dtype, *contexts):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            leaves = [X.to(dtype).requires_grad_() for X in heads]
            output = attention(*leaves, is_causal=True, enable_gqa=True)
            return torch.autograd.grad((output * wanted.to(dtype)).sum(), leaves)

    once, again = (found(dtype, lambda: gradients(here()), lambda: saved_memory(heads[0].to(dtype))) for _ in range(2))
    assert all(map(torch.equal, once, again))
    for gradient, expected in zip(once, found(torch.float64, torch.enable_grad), strict=True):
        assert float((gradient.double() - expected).norm() / expected.norm()) < tolerance


def test_a_cpu_computes_as_ever():
    with torch.enable_grad():
        assert not isinstance(saved_memory(torch.zeros(1, 2, 4)), SavingAttention)
