"""Panels without effects are the panels, and what cannot be compiled says so.

Whole runs are compiled in tests/astro_dist/test_compiled_runs.py.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from astro.errors import NumericalError
from astro.linalg import compiled
from astro.linalg.panels import Panels
from astro.quantization import gptq, refine

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(16, 40), (5, 1), (2, 16, 40), (3, 1, 7)]


def panel(shape, count, seed=0):
    """Unit upper triangular feedback, and tensors of a panel."""
    generator = torch.Generator().manual_seed(seed)
    N = torch.randn(*shape[:-1], shape[-2], generator=generator).mul(0.1).triu(1)
    return N, [torch.randn(shape, generator=generator) for _ in range(count)]


def settled(block, M, **arrays):
    """The results of a block of columns with these inputs, copies."""
    block.M.copy_(M)
    for name, X in arrays.items():
        getattr(block.arrays, name).copy_(X)
    block.settle_()
    return {name: X.clone() for name, X in block.arrays._asdict().items()}


def gptq_inputs(shape):
    """Couplings and arrays of columns that are rounded."""
    N, (T, W, S) = panel(shape, 3)
    return N, {"T": T, "W": W, "S": S.abs() + 0.1, "low": torch.full(shape, -4.0), "high": torch.full(shape, 3.0)}


def refine_inputs(shape):
    """Couplings and arrays of columns that are moved, with bounds as zero points and integers make them."""
    M, (T,) = panel(shape, 1)
    low = torch.arange(T.numel()).view_as(T) % 3 - 3.0
    return M, {"T": 2 * T, "low": low, "high": low + 4}


@pytest.mark.parametrize("shape", SHAPES)
def test_panel_of_gptq_without_effects_is_the_panel(shape):
    N, arrays = gptq_inputs(shape)
    block = settled(gptq._block(arrays["T"]), N, **arrays)
    unused = torch.full(shape, torch.nan)
    torch.testing.assert_close((block["E"], block["V"]), gptq._rounded_panel(N, *arrays.values(), unused, unused))
    assert -4 <= int(block["V"].min()) < int(block["V"].max()) <= 3


@pytest.mark.parametrize("shape", SHAPES)
def test_panel_of_refinement_without_effects_is_the_panel(shape):
    M, arrays = refine_inputs(shape)
    block = settled(refine._block(arrays["T"]), M, **arrays)
    torch.testing.assert_close(
        (block["D"], block["T"]), refine._moved_panel(M, *arrays.values(), torch.full(shape, torch.nan))
    )
    assert int(block["D"].ne(0).sum()) > 0


@pytest.mark.parametrize("shape", [(40, 9), (2, 40, 9)])
@pytest.mark.parametrize(("module", "inputs"), [(gptq, gptq_inputs), (refine, refine_inputs)])
def test_blocks_of_several_panels_are_the_same_either_way(monkeypatch, module, inputs, shape):
    M, arrays = inputs(shape)
    results = []
    for enabled in (False, True):  # not compiled: what is marked runs as it is
        monkeypatch.setattr(compiled, "is_enabled", lambda enabled=enabled: enabled)
        block = settled(module._block(arrays["T"]), M, **arrays)
        results.append({name: block[name] for name in block if name != "T" or module is refine})
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("columns", [1, 16, 17, 40])
def test_every_column_takes_what_all_before_it_were_settled_to(columns):
    """The law alone, t_j + Σ_{i<j} M_ij m_i, with steps that double."""

    class Arrays(NamedTuple):
        T: torch.Tensor
        D: torch.Tensor

    M, (T,) = panel((columns, 3), 1)
    arrays = Arrays(T.clone(), torch.empty_like(T))
    block = Panels(arrays, (arrays.D,), lambda column: torch.mul(column.T, 2, out=column.D), lambda: ())
    block.M.copy_(M)
    block.settle_()
    expected = torch.linalg.solve_triangular(torch.eye(columns).double() / 2 - M.double().mT, T.double(), upper=False)
    torch.testing.assert_close(arrays.D.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_the_thread_that_asked_for_it_compiles():
    compiled.use("compiled")
    try:
        with ThreadPoolExecutor(1) as pool:
            assert (compiled.is_enabled(), pool.submit(compiled.is_enabled).result()) == (True, False)
    finally:
        compiled.use("plain")
    assert not compiled.is_enabled()


def test_compiler_has_its_own_settings_again_behind_a_context():
    wanted = [values for _, values in compiled._compiler_settings()]

    def settings():
        return [{name: getattr(module, name) for name in values} for module, values in compiled._compiler_settings()]

    def before_within_and_behind():
        before = settings()
        with compiled.using("compiled"):
            within = settings()
        return before, within, settings()

    with ThreadPoolExecutor(1) as pool:  # a thread in which nothing was set yet
        before, within, behind = pool.submit(before_within_and_behind).result()
    assert before == behind != within == wanted


def chosen_by_a_clock():
    config = torch._inductor.config
    return [config.triton.autotune_pointwise, config.max_autotune, config.max_autotune_pointwise,
            config.coordinate_descent_tuning]  # fmt: skip


def test_kernels_are_chosen_by_a_clock_in_no_thread_that_compiles():
    """Torch keeps its settings by thread: what one thread has set, no other one knows."""

    def used():
        compiled.use("compiled")
        return chosen_by_a_clock()

    with torch._inductor.config.patch({"max_autotune": True}), compiled.using("compiled"):
        assert chosen_by_a_clock() == [False] * 4
        within = compiled.carried(chosen_by_a_clock)
    with ThreadPoolExecutor(1) as pool:
        assert any(pool.submit(chosen_by_a_clock).result()), "as torch has it"
        assert pool.submit(within).result() == [False] * 4, "as for backward functions, which autograd calls"
        assert pool.submit(used).result() == [False] * 4


def test_what_is_carried_runs_elsewhere_as_it_was_chosen_here():
    with compiled.using("compiled"):
        asked = compiled.carried(compiled.is_enabled)
    assert not compiled.is_enabled()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asked).result()
        assert not pool.submit(compiled.is_enabled).result(), "the thread is as it was"


def test_what_cannot_be_compiled_names_the_switch(monkeypatch):
    @compiled.fused
    def looks_at_values(X):
        return X + 1 if bool(X.sum() > 0) else X

    X = torch.ones(3)
    assert torch.equal(looks_at_values(X), X + 1)
    monkeypatch.setattr(compiled._thread, "loops", "compiled")
    with pytest.raises(NumericalError, match=r"looks_at_values cannot be compiled: .*set execution\.compile to false"):
        looks_at_values(X)
