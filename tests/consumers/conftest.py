"""What the readers are given: SmolLM2 quantized by our own pipeline, and what our own reader makes of that."""

from pathlib import Path

import pytest
import transformers

from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from tests.support.dequantized import write_dequantized

OPTIONS = {
    "--model": "folder with SmolLM2-135M, in safetensors",
    "--vllm-python": "the Python of an environment with vLLM for CPUs",
    "--humming": "a folder with the packages humming-kernels, cuda-bindings and cuda-pathfinder",
    "--gptqmodel-python": "the Python of an environment with transformers, optimum and GPTQModel",
}
# Quick, because the readers are tested and not the quality; good enough for text that makes sense.
QUICK = {
    "regularizer": {"name": "none"},
    "calibration": {"samples": 4, "sequence_length": 256, "chunk_samples": 2, "holdout_samples": 1},
    "execution": {"executor": "local", "workers": 1, "device": "cpu"},
}
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Photosynthesis is the process by which plants",
)


def pytest_addoption(parser):
    for option, meaning in OPTIONS.items():
        parser.addoption(option, help=meaning)


def option(request, name):
    """What was given on the command line; the test is skipped where nothing was."""
    given = request.config.getoption(name, default=None)
    if not given:
        pytest.skip(f"{name} is not given: {OPTIONS[name]}")
    return given


@pytest.fixture(scope="session")
def vllm_python(request):
    return option(request, "--vllm-python")


@pytest.fixture(scope="session")
def gptqmodel_python(request):
    return option(request, "--gptqmodel-python")


@pytest.fixture(scope="session")
def tokenizer(request):
    return transformers.AutoTokenizer.from_pretrained(option(request, "--model"))


@pytest.fixture(scope="session")
def quantized(request, tmp_path_factory):
    """Folder of the model in a format, symmetric in groups of 64; made when it is first asked for."""
    source, made = option(request, "--model"), {}

    def make(layout: str, bits: int = 4, rank: int = 0) -> Path:
        if (layout, bits, rank) not in made:
            run = tmp_path_factory.mktemp(f"{layout}-{bits}-{rank}") / "run"
            # At 8 bits rounding is as good as anything.
            method = {"method": "gptq" if bits == 4 else "rtn"}
            quantization = {"bits": bits, "group_size": 64, "format": layout, **method}
            content = {
                **QUICK, "model": {"source": source}, "quantization": quantization, "output": {"dir": run},
                "reconstruction": {"rank": rank},
            }  # fmt: skip
            pipeline.quantize(RunConfig.model_validate(content))
            made[layout, bits, rank] = run / "model"
        return made[layout, bits, rank]

    return make


@pytest.fixture(scope="session")
def dequantized(request, quantized, tmp_path_factory):
    """Folder of a plain model with the float32 weights that our reader makes of a quantized one."""
    made = {}

    def make(layout: str, bits: int = 4, rank: int = 0) -> Path:
        if (layout, bits, rank) not in made:
            made[layout, bits, rank] = tmp_path_factory.mktemp(f"dequantized-{layout}-{bits}-{rank}")
            source = Path(option(request, "--model"))
            write_dequantized(source, quantized(layout, bits, rank), made[layout, bits, rank])
        return made[layout, bits, rank]

    return make
