"""Plain transformers, with the package that each format needs, computes exactly what our own reader of the files gives.

Float32 on the CPU. compressed-tensors multiplies integers by scales in float32, as our reader does. GPTQModel does it
in the scales' float16 whatever the model's dtype, so there our weights are rounded to float16 first. See test_vllm.py
for how to run it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.consumers.conftest import PROMPTS

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).with_name("read_logits.py")


@pytest.fixture(params=["compressed-tensors", "gptq"])
def reader(request):
    """A format, and the Python of an environment that reads it."""
    return request.param, request.getfixturevalue("gptqmodel_python") if request.param == "gptq" else sys.executable


@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_those_of_our_dequantized_weights(reader, bits, quantized, dequantized, tokenizer, tmp_path):
    layout, python = reader
    tokens = tokenizer(" ".join(PROMPTS), return_tensors="pt").input_ids
    save_file({"tokens": tokens}, tmp_path / "tokens")
    command = [python, SCRIPT, quantized(layout, bits), tmp_path / "tokens", tmp_path / "logits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("problems") == {}
    ours = transformers.AutoModelForCausalLM.from_pretrained(dequantized(layout, bits), dtype=torch.float32)
    if layout == "gptq":
        for parameter in ours.parameters():
            parameter.data = parameter.data.half().float()
    with torch.no_grad():
        expected = ours(tokens).logits
    difference = (load_file(tmp_path / "logits")["logits"] - expected).abs().max()
    print(f"{layout}, {bits} bits, {told}: logits up to {expected.abs().max():.1f} differ by at most {difference:.3g}")
    assert difference == 0
