"""What is installed on this machine and which devices it has, for a bug report."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

import astro
from astro.process import set_allocator

__all__ = ["read_environment"]

_PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "safetensors",
    "huggingface-hub",
    "compressed-tensors",
    "datasets",
    "lm-eval",
)


def read_environment() -> dict[str, Any]:
    """Return what is installed and which devices there are, by name."""
    return {
        "astro-dist": f"{astro.__version__}, in {Path(astro.__file__).parents[1]}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in _PACKAGES},
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": decimal(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "gpus": _gpus(),
        "C++ compiler": shutil.which(os.environ.get("CXX", "g++")) or "none, so `execution.compile` cannot be used",
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS") or "not set",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE") or "not set",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    set_allocator()  # a run may go on in this process
    if not torch.cuda.is_available():
        return f"none that torch can use (its CUDA: {torch.version.cuda or 'none, it is built for CPUs'})"
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({decimal(gpu.total_memory)})" for gpu in properties)
