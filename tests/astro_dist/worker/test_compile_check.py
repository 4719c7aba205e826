"""Compilers that are missing are found before any block is begun, and the message says which node lacks what."""

import platform

import pytest
import torch

from astro.config import Regularizer, SolverSettings
from astro.errors import RunError
from astro.quantization import row_solver
from astro.quantization.row_solver import Recipe
from astro_dist.worker import compile_check
from astro_dist.worker.compile_check import require_compiler, warm_up


def fail(*_):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_what_is_missing_for_a_gpu_is_named_with_the_node(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_check, "_difference", fail)
    monkeypatch.setattr(compile_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(compile_check.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(compile_check, "find_library", lambda name: None)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    with pytest.raises(RunError) as caught:
        require_compiler(torch.device("cuda"))
    message = str(caught.value)
    assert message.startswith(f"{platform.node()}: the innermost loops cannot be compiled: Failed to find C compiler.")
    for words in ("none of gcc, clang, cc: install", f"no Python.h in {tmp_path}", "no libcuda.so", "compile: false"):
        assert words in message


def test_memory_that_is_too_little_is_no_matter_of_compilers(monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compile_check, "_difference", short)
    with pytest.raises(torch.OutOfMemoryError):
        require_compiler(torch.device("cpu"))


def test_warming_up_goes_through_every_loop(monkeypatch):
    """As a block of the run would: GPTQ for the search of β and for the rows, and refinement."""
    seen = []
    for module, name in ((row_solver.gptq, "solve"), (row_solver, "refine")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    warm_up(Recipe(SolverSettings(), Regularizer(), torch.bfloat16), torch.device("cpu"))
    assert seen.count("refine") == 1
    assert seen.count("solve") >= 2
