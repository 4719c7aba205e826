"""Panels without effects are the panels; what cannot be compiled says so. Compiled for real: dist/test_compiled.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astro.errors import NumericalError
from astro.linalg import compiled
from astro.quantization import gptq, refine

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
    columns, E = gptq._Columns(T), torch.empty_like(T)
    for name, given in (("N", N), ("T", T), ("W", W), ("S", S), ("low", low), ("high", high)):
        getattr(columns, name).copy_(given)
    columns.round_(E)
    torch.testing.assert_close((columns.V, E), fused)
    assert -4 <= int(columns.V.min()) < int(columns.V.max()) <= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_panel_of_refinement_is_the_panel(shape):
    M, (T,) = panel(shape, 1)
    low = torch.arange(T.numel()).view_as(T) % 3 - 3.0  # as zero points and integers make them
    columns = refine._Columns(T)
    for own, given in ((columns.M, M), (columns.T, 2 * T), (columns.low, low), (columns.high, low + 4)):
        own.copy_(given)
    fused = refine._moved_panel(M, 2 * T, low, low + 4)
    torch.testing.assert_close((columns.choose_(), columns.T), fused)
    assert int(fused[0].ne(0).sum()) > 0


@pytest.mark.parametrize("shape", [(40, 9), (2, 40, 9)])
def test_blocks_of_several_panels_are_the_same_either_way(monkeypatch, shape):
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randn(shape, generator=generator) for name in ("T", "W", "S")}
    given |= {"low": torch.full(shape, -4.0), "high": torch.full(shape, 3.0), "S": given["S"].abs() + 0.1}
    N = panel(shape, 0)[0]
    found = []
    for enabled in (False, True):  # not compiled: what is marked runs as it is
        monkeypatch.setattr(compiled, "is_enabled", lambda enabled=enabled: enabled)
        solving, refining, E = gptq._Columns(given["T"]), refine._Columns(given["T"]), torch.empty(shape)
        for name, value in given.items():
            getattr(solving, name).copy_(value)
        for name in ("T", "low", "high"):
            getattr(refining, name).copy_(3 * given[name])
        solving.N.copy_(N)
        refining.M.copy_(N)
        solving.round_(E)
        found.append((solving.V, E, refining.choose_(), refining.T))
    torch.testing.assert_close(found[0], found[1])
    assert bool(found[0][2].any())


def test_only_the_thread_that_asked_for_it_compiles():
    compiled.enable(True)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert (compiled.is_enabled(), pool.submit(compiled.is_enabled).result()) == (True, False)
    finally:
        compiled.enable(False)
    assert not compiled.is_enabled()


def test_what_cannot_be_compiled_names_the_switch(monkeypatch):
    @compiled.fused
    def looks_at_values(X):
        return X + 1 if bool(X.sum() > 0) else X

    X = torch.ones(3)
    assert torch.equal(looks_at_values(X), X + 1)
    monkeypatch.setattr(compiled._own, "enabled", True)
    with pytest.raises(NumericalError, match=r"looks_at_values cannot be compiled: .*set execution\.compile to false"):
        looks_at_values(X)
