"""What a worker finds out about its device before any call, and what it says where memory is too little."""

import os
import pickle
from types import SimpleNamespace

import pytest
import torch

from astro import process
from astro.errors import ConfigError, MemoryShortage, RunError
from astro_dist.execution.local_executor import LocalExecutor
from astro_dist.planning.devices import gpu_here
from astro_dist.worker import device_check
from astro_dist.worker.device_check import gpu_trouble, has_gpu, require_memory, takes_gpu, within_memory
from astro_dist.worker.worker import Worker

GPU = torch.device("cuda")
OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
MODULE = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A machine with a driver of NVIDIA, a GPU, and a torch that is built for CUDA 13."""
    (tmp_path / "version").write_text(MODULE)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setattr(device_check, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(device_check, "_GPU_FOLDER", tmp_path / "gpus")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what is set for torch is forgotten afterwards
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        os.environ.pop(name, None)
    return tmp_path


def failing(message):
    def ones(*_, **__):
        raise RuntimeError(message)

    return ones


def test_driver_that_is_too_old_is_named_beside_what_torch_wants(driver, monkeypatch):
    monkeypatch.setattr(torch, "ones", failing(OLD))
    trouble = gpu_trouble()
    for words in ("CUDA 13.0", "too old (found version 11040)", "470.82.01", "at least 580.65", "device: cpu"):
        assert words in trouble


def test_driver_that_is_not_loaded_and_torch_without_cuda(driver, monkeypatch):
    (driver / "version").unlink()
    monkeypatch.setattr(torch, "ones", failing("Found no NVIDIA driver on your system."))
    assert "no NVIDIA driver is loaded here" in gpu_trouble()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is built without CUDA" in gpu_trouble()


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUDA out of memory. Tried to allocate 2.00 MiB"])
def test_gpu_that_others_fill_is_no_matter_of_drivers(driver, monkeypatch, message):
    monkeypatch.setattr(torch, "ones", failing(message))
    trouble = gpu_trouble()
    assert message in trouble
    assert "nvidia-smi" in trouble
    assert "Install" not in trouble


def test_worker_that_finds_too_little_memory_at_its_start_says_so(monkeypatch):
    def open_source(spec):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has")

    monkeypatch.setattr("astro_dist.worker.worker.BlockRunner", open_source)
    with pytest.raises(MemoryShortage, match=r"3.00 GiB more were wanted"):
        Worker(SimpleNamespace(device="cpu", threads=1, column_loops="plain")).prepare()


def test_gpu_that_computes_is_no_trouble(driver, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    assert gpu_trouble() is None


def test_gpu_that_is_hidden_is_not_there(driver, monkeypatch):
    assert has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu()


def test_worker_says_before_anything_else_that_its_gpu_cannot_be_used(driver, monkeypatch):
    monkeypatch.setattr(torch, "ones", failing(OLD))
    with pytest.raises(RunError, match=r".+: torch .* is built for CUDA 13.0 and can use no GPU: The NVIDIA driver on"):
        Worker(SimpleNamespace(device="cuda", threads=1, column_loops="plain")).prepare()


@pytest.mark.parametrize("name", [None, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_allocation_is_set_unless_the_user_did(monkeypatch, name):
    environment = {name: "backend:cudaMallocAsync"} if name else {}
    monkeypatch.setattr(os, "environ", environment)
    process.set_allocator()
    usual = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert environment == ({name: "backend:cudaMallocAsync"} if name else usual)


def as_worker():
    Worker(SimpleNamespace(device="cuda", threads=1, column_loops="plain")).prepare()


@pytest.mark.parametrize(
    "start", [as_worker, lambda: LocalExecutor(1, device="auto"), lambda: takes_gpu("cuda", "--device")],
    ids=["worker", "local executor", "judge"],
)  # fmt: skip
def test_allocation_is_set_when_the_first_tensor_is_made(driver, monkeypatch, start):
    """Torch reads it then, and never again."""
    seen = []

    def ones(*_, device):
        seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
        raise RuntimeError(OLD)

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises((RunError, ConfigError)):
        start()
    assert seen == ["expandable_segments:True"]


def test_allocation_is_set_before_a_plan_asks_what_the_gpu_is(driver, monkeypatch):
    def properties(index):
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        return SimpleNamespace(name="NVIDIA H100", total_memory=85 * 10**9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert gpu_here().name == "h100"


@pytest.mark.parametrize("key", ["execution.device:", "--device"])
def test_gpu_that_cannot_be_used_is_refused_in_the_words_of_who_asked(driver, monkeypatch, key):
    monkeypatch.setattr(torch, "ones", failing(OLD))
    with pytest.raises(
        ConfigError, match=rf"^{key} auto: this machine has a GPU, but .* 470.82.01.*, or set {key} cpu$"
    ):
        takes_gpu("auto", key)
    with pytest.raises(ConfigError, match=rf"^{key} cuda: a GPU of this machine is asked for, but "):
        takes_gpu("cuda", key)
    assert not takes_gpu("cpu", key)


@pytest.fixture
def card(monkeypatch):
    """A GPU of 80 GB of which other processes hold 20, besides half a GB of this process's own."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 12 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_free_memory_counts_and_not_all_memory(card):
    require_memory(58 * 10**9, GPU)  # a reserve of 2.4 GB is left, and the context of 0.5 GB is there
    with pytest.raises(RunError, match=r"its NVIDIA H100, of whose 80.0 GB 60.0 GB are free, has 58.1 GB for it"):
        require_memory(59 * 10**9, GPU)
    with pytest.raises(RunError, match="Other processes hold the rest of it: `nvidia-smi` lists them"):
        require_memory(77 * 10**9, GPU)
    with pytest.raises(RunError) as caught:
        require_memory(78 * 10**9, GPU)
    assert "nvidia-smi" not in str(caught.value)


OUT = "CUDA out of memory. Tried to allocate 13.50 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError(OUT), "13.50 GiB more were wanted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"), "99 bytes more"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (MemoryError(), "MemoryError"),
    ],
    ids=["torch", "cpu", "cublas", "python"],
)
def test_too_little_memory_says_how_much_was_wanted_and_free(card, error, wanted):
    def action():
        raise error

    with pytest.raises(MemoryShortage) as caught:
        within_memory(action, GPU)
    message = str(caught.value)
    assert f"out of memory: {wanted}" in message
    assert "of the 80.0 GB of this NVIDIA H100 60.0 GB were free, and it held 12.0 GB" in message
    assert caught.value.__context__ is None, "what failed would hold its tensors"
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shape mismatch$"):
        within_memory(lambda: failing("shape mismatch")(), torch.device("cpu"))
