"""Panels without effects are the panels; what cannot be compiled says so. Compiled for real: dist/test_compiled.py."""

import pytest
import torch

from astro import fusion, gptq, refine
from astro.errors import NumericalError

SHAPES = [(16, 40), (5, 1), (2, 16, 40), (3, 1, 7)]


def panel(shape, count, seed=0):
    """Unit upper triangular feedback, and tensors of a panel."""
    generator = torch.Generator().manual_seed(seed)
    N = torch.randn(*shape[:-1], shape[-2], generator=generator).mul(0.1).triu(1)
    return N, [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_panel_of_gptq_is_the_panel(shape):
    N, (T, W, S) = panel(shape, 3)
    S, low, high = S.abs() + 0.1, torch.full(shape, -4.0), torch.full(shape, 3.0)
    fused = gptq._rounded_panel(N, T, W, S, low, high)
    E, V = torch.empty_like(T), torch.empty_like(T)
    gptq._solve_panel_(N, T, W, E, V, S, low, high)
    torch.testing.assert_close((V, E), fused)
    assert -4 <= int(V.min()) < int(V.max()) <= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_panel_of_refinement_is_the_panel(shape):
    N, (G, V) = panel(shape, 2)
    H, V = N + N.mT, V.round()
    s, pace = G[..., 0, :].abs() + 0.1, torch.ones(*shape[:-1], 1)
    low, high = torch.full_like(s, -4), torch.full_like(s, 3)
    fused = refine._moved_panel(H, s, low, high, pace, G, V)
    D, Q = torch.empty_like(V), torch.empty_like(V)
    refine._move_panel_(H, s, low, high, pace, G, V, D, Q)
    torch.testing.assert_close((G, D, Q), fused)
    assert int(Q.ne(V).sum()) > 0


def test_what_cannot_be_compiled_names_the_switch(monkeypatch):
    @fusion.fused
    def looks_at_values(X):
        return X + 1 if bool(X.sum() > 0) else X

    X = torch.ones(3)
    assert torch.equal(looks_at_values(X), X + 1)
    monkeypatch.setattr(fusion, "_enabled", True)
    with pytest.raises(NumericalError, match=r"looks_at_values cannot be compiled: .*set execution\.compile to false"):
        looks_at_values(X)
