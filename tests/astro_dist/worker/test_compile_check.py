"""Compilers that are missing are found before any block is begun, and the message says which node lacks what."""

import platform

import pytest
import torch

from astro.config import Regularizer, SolverSettings
from astro.errors import RunError
from astro.linalg import compiled
from astro.quantization import column_ops, row_solver
from astro.quantization.recipe import Recipe
from astro_dist.worker import compile_check
from astro_dist.worker.compile_check import require_loops


def require(loops, device="cpu", warms_up=True):
    require_loops(loops, Recipe(SolverSettings(), Regularizer(), torch.bfloat16), torch.device(device), warms_up)


@pytest.fixture(autouse=True)
def plain_afterwards():
    yield
    compiled.use("plain")


def fail(*_):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_what_is_missing_for_a_gpu_is_named_with_the_node(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_check, "_difference", fail)
    monkeypatch.setattr(compile_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(compile_check.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(compile_check, "find_library", lambda name: None)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    with pytest.raises(RunError) as caught:
        require("compiled", "cuda")
    message = str(caught.value)
    assert message.startswith(f"{platform.node()}: the innermost loops cannot be compiled: Failed to find C compiler.")
    for words in ("none of gcc, clang, cc: install", f"no Python.h in {tmp_path}", "no libcuda.so", "compile: false"):
        assert words in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError("std::bad_alloc"),
    ],
    ids=["torch", "cublas", "python"],
)
def test_memory_that_is_too_little_is_no_matter_of_compilers(monkeypatch, error):
    def short(*_):
        raise error

    monkeypatch.setattr(compile_check, "_difference", short)
    with pytest.raises(type(error), match=str(error)):
        require("compiled")


def test_warming_up_goes_through_every_loop(monkeypatch):
    """As a block of the run would: GPTQ for the search of β and for the rows, and refinement."""
    seen = []
    for module, name in ((row_solver.gptq, "solve"), (row_solver, "refine")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    monkeypatch.setattr(compile_check, "_difference", lambda A, B: A)
    monkeypatch.setattr(compile_check.compiled, "use", lambda loops: None)
    require("compiled", warms_up=False)
    assert not seen
    require("compiled")
    assert seen.count("refine") == 1
    assert seen.count("solve") >= 2


def test_kernels_that_cannot_be_built_are_named_by_the_first_that_is_wanted(monkeypatch):
    """Which is that of the search of β, before any layer is solved."""
    monkeypatch.setattr(compile_check, "require_kernels", lambda device: None)
    monkeypatch.setattr(column_ops, "_kernels", fail)
    with pytest.raises(RunError, match=f"{platform.node()}: the innermost loops cannot be compiled: Failed to find C"):
        require("kernels", warms_up=False)


def test_machine_without_kernels_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(column_ops, "_kernels", lambda: None)
    with pytest.raises(RunError, match=f"{platform.node()}: the kernels of the column loops run on GPUs only"):
        require("kernels")


def test_plain_loops_want_nothing(monkeypatch):
    monkeypatch.setattr(compile_check, "require_compiled", fail)
    require("plain")
