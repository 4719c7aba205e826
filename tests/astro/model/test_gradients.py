"""Gradients are the same ones twice, and what torch was told for that is forgotten afterwards."""

import contextlib

import pytest
import torch

from astro.errors import UnsupportedError
from astro.model.gradients import _deterministic, gradients, straight_through
from tests.support.devices import here


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.parametrize("fills", [True, False])
def test_fresh_memory_is_not_filled_and_the_settings_are_as_they_were(monkeypatch, fills):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fills)
    before = settings()
    with contextlib.suppress(KeyError), _deterministic(on_gpu=True):
        assert settings() == (True, True, False)
        raise KeyError
    assert settings() == before


@pytest.mark.usefixtures("device")
def test_gradients_that_add_up_in_many_places_have_the_same_bits_twice():
    """The way back of `index_select` adds in any order on a GPU, unless it is told not to."""
    places = torch.randint(4, (4096,))
    X = torch.randn(4096, 16)
    found = []
    for _ in range(2):
        W = torch.ones(4, 16, requires_grad=True)
        with torch.no_grad(), gradients(here()):
            (gradient,) = torch.autograd.grad((W.index_select(0, places) * X).sum(), W)
        found.append(gradient)
    assert torch.equal(*found)
    expected = torch.zeros(4, 16, dtype=torch.float64).index_add_(0, places, X.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("device")
def test_an_operation_without_a_gradient_is_named():
    W = torch.ones(3, requires_grad=True)
    message = "no gradient passes through this block: element 0 of tensors does not"
    with pytest.raises(UnsupportedError, match=message), gradients(here()):
        torch.autograd.grad(W.detach().sum(), W)


@pytest.mark.usefixtures("device")
def test_gradient_passes_what_is_rounded():
    X = torch.tensor([0.2, 1.7]).requires_grad_()
    with gradients(here()):
        Y = straight_through(X, torch.round)
        Y.backward(torch.tensor([3.0, 5.0]))
    assert (Y.tolist(), X.grad.tolist()) == ([0.0, 2.0], [3.0, 5.0])
