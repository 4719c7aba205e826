"""Kernels of the column loops, in Triton's interpreter or on a GPU, against the same loops as operations of torch."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from astro.config import LayerScheme, SolverSettings
from astro.errors import NumericalError
from astro.linalg import bf16_matmul, compiled
from astro.linalg.cholesky import factorize
from astro.linalg.symmetric import layer_error
from astro.quantization import column_ops, gptq
from astro.quantization import refine as refine_module
from astro.quantization.grid import QuantizedLinear, fit_grid
from tests.support.devices import here
from tests.support.models import correlated_inputs, random_weights

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_RUN = HAS_TRITON and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
runs = pytest.mark.skipif(not IS_RUN, reason="Triton runs on a GPU, or on a CPU with TRITON_INTERPRET=1")
pytestmark = pytest.mark.usefixtures("device")
ROOT = Path(__file__).parents[3]
COMPILED = """
from tests.support.compiled_kernels import compiled_kernels

for name, code, _ in compiled_kernels():
    assert "bar.sync" not in code and "div.full" not in code and "fma.rn" in code
    print(name)
"""


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    yield
    compiled.use("plain")


def problem(columns=40, rows=35, layers=2, **changes):
    """Layers side by side with their factor and grid, with rows for a program and a part of one."""
    X = [correlated_inputs(3 * columns, columns, seed) for seed in range(layers)]
    H = torch.stack([x.T @ x / len(x) for x in X]).float()
    W = torch.stack([random_weights(rows, columns, seed + 1) for seed in range(layers)])
    factor = factorize(H, gptq.activation_order(H), 0.01, 1.0, ["a", "b"])
    scheme = LayerScheme(**{"group_size": 8, "bits": 3, **changes})
    return W, H, factor, fit_grid(W, scheme, SolverSettings(), torch.float16, factor.cost)


def both(action):
    """What an action returns as operations of torch, and with kernels."""
    results = []
    for loops in ("plain", "kernels"):
        compiled.use(loops)
        results.append(action())
    return results


@runs
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_that_of_the_plain_loop(monkeypatch, symmetric):
    monkeypatch.setattr(gptq, "_BLOCK", 16)  # two whole blocks and a part of one
    W, H, factor, grid = problem(symmetric=symmetric)
    plain, kernels = both(lambda: gptq.solve(W, factor, grid))
    assert float(kernels.ne(plain).float().mean()) < 2e-3  # a tie may fall the other way
    errors = [float(layer_error(W, grid.dequantize(Q), H).sum()) for Q in (plain, kernels)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@runs
@pytest.mark.parametrize(("symmetric", "group_size", "is_rounded"), [(True, 8, False), (False, 20, True)])
def test_refinement_is_that_of_the_plain_loop(monkeypatch, symmetric, group_size, is_rounded):
    monkeypatch.setattr(refine_module, "_SPAN", 20)  # several groups in a span, or several blocks in a group
    monkeypatch.setattr(refine_module, "_BLOCK", 10)
    monkeypatch.setattr(bf16_matmul, "_is_faster", lambda device: is_rounded)
    W, H, factor, grid = problem(symmetric=symmetric, group_size=group_size)
    Q, damping = gptq.solve(W, factor, grid), 0.01 * H.diagonal(dim1=-2, dim2=-1).mean(-1)
    settings = SolverSettings(refine_passes=2, refine_tolerance=0.0)
    plain, kernels = both(
        lambda: refine_module.refine(W, QuantizedLinear(Q, grid), H, damping, settings, torch.float16)
    )
    assert float(plain[0].Q.ne(Q).float().mean()) > 0.02
    assert float(kernels[0].Q.ne(plain[0].Q).float().mean()) < 2e-3
    assert float(kernels[0].grid.scale.ne(plain[0].grid.scale).float().mean()) < 3e-2
    torch.testing.assert_close(kernels[1].sum(), plain[1].sum(), rtol=1e-3, atol=0)


@runs
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it():
    compiled.use("kernels")
    W, _, factor, grid = problem(columns=16)
    whole = gptq.solve(W, factor, grid)
    part = type(grid)(grid.scale[:, 30:35], grid.zero[:, 30:35], 3, 8, True)
    assert torch.equal(gptq.solve(W[:, 30:35], factor, part), whole[:, 30:35])


@runs
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter, where NaN becomes an integer
def test_what_is_not_finite_stays_so():
    """Who looks at the layer error must find it."""
    compiled.use("kernels")
    M, W, one = torch.zeros(1, 2, 2), torch.tensor([[[1.0, torch.nan], [torch.nan, 1.0]]]), torch.ones(1, 1, 2)
    E, Q = torch.zeros_like(W), torch.zeros_like(W, dtype=torch.int8)
    column_ops.round_columns(M, W, W, one, 0 * one, torch.zeros(1, 2, dtype=torch.long), E, Q, -8, 7)
    assert torch.isnan(E)[torch.isnan(W)].all()  # and in later columns of the row: 0 times NaN is NaN
    assert not torch.isnan(E[0, 0, 0])


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not there")
def test_kernels_compile_for_a_gpu_and_wait_for_no_other_thread():
    """The interpreter takes more than the compiler does. In a process of its own, which interprets nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["round_columns", "move_scale", "move_columns"]


@pytest.mark.skipif(HAS_TRITON, reason="Triton is there")
def test_without_triton_the_switch_is_named():
    with pytest.raises(
        NumericalError, match="need Triton, which comes with torch's builds for GPUs.*execution.compile"
    ):
        column_ops.require_kernels(here())


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not there")
def test_a_cpu_that_shall_run_kernels_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NumericalError, match="run on GPUs only.*set execution.compile to auto"):
        column_ops.require_kernels(torch.device("cpu"))


def test_operators_know_what_they_write():
    """Torch's own check, with data that the kernels never see."""
    assert here() is not None
    schema = {name: str(getattr(torch.ops.astro, name).default._schema) for name in ("round_columns", "move_columns")}
    assert "Tensor(a6!) E, Tensor(a7!) Q" in schema["round_columns"]
    assert "Tensor(a1!) V, Tensor(a2!) E, Tensor(a3!)? E_rounded" in schema["move_columns"]
