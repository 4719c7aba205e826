"""vLLM's own loader takes what we write, with images and with speculation: every parameter of its model is filled.

    python -m pytest -n 0 tests/consumers/test_vllm_loader.py -m consumers -rP --vllm-python VLLM_ENVIRONMENT/bin/python

The models are tiny and random, in the layout of the Hub's repositories; the environment needs torchvision for those
that take images. No kernel runs (`vllm_loader.py`), so this tells nothing of numbers, and all of names and shapes.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from astro_dist import pipeline
from astro_dist.export.cache_scales import CACHE_SCALES_NAME
from tests.astro_dist.test_wrapper_runs import config_of
from tests.support.wrappers import WITH_DRAFTER, WRAPPERS, write_model

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).with_name("vllm_loader.py")


def examined(python: str, folder: str, drafter: str | None = None) -> dict:
    """Return what vLLM's loader made of a folder."""
    command = [python, SCRIPT, folder, *([drafter] if drafter else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    print(answer["model"], answer["parameters"], "parameters,", answer["packed"], "packed")
    return answer


def quantized(source: Path, run: Path) -> str:
    """Quantize a model in groups of 32, which are what vLLM's layouts ask for at least."""
    return pipeline.quantize(config_of(source, run, group_size=32)).model


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_is_loaded_with_its_vision_tower(vllm_python, tmp_path, name):
    answer = examined(vllm_python, quantized(write_model(tmp_path / "source", name), tmp_path / "run"))
    assert answer["model"] == WRAPPERS[name][0]
    assert answer["unfilled"] == []
    assert answer["packed"] > 4
    assert any(layer.startswith(("visual", "vision")) for layer in answer["not packed"])


@pytest.mark.parametrize("name", WITH_DRAFTER)
def test_drafter_is_loaded_for_speculation(vllm_python, tmp_path, name):
    answer = examined(vllm_python, quantized(write_model(tmp_path / "source", name), tmp_path / "run"), "mtp")
    assert "MTP" in answer["model"]
    assert (answer["unfilled"], answer["packed"]) == ([], 0)


def test_scales_of_the_cache_are_loaded(vllm_python, run_config):
    model = Path(pipeline.quantize(run_config(calibration__holdout_samples=0, activations__kv_cache="fp8")).model)
    scales = load_file(model / CACHE_SCALES_NAME)
    written = {name.replace(".self_attn.", ".self_attn.attn."): float(scale) for name, scale in scales.items()}
    assert len(written) == 6
    assert examined(vllm_python, str(model))["cache scales"] == pytest.approx(written)
