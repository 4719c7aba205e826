"""The README's main job on a real model: its result loads in plain transformers and says what our own weights say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from astro.config import LayerScheme
from astro.formats import compressed_tensors
from astro.quantization.layer_record import Fallbacks
from astro.storage.checkpoint import Checkpoint
from astro_dist.export.verify import verify_model
from astro_dist.run_directory.summary import read_summary
from astro_dist.source.demo import resolve_demo

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart's own command; its run directory."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "astro_dist", "quantize", "configs/smollm2-135m-cpu.yaml"]
    # XDG_CACHE_HOME: the converted checkpoint is made anew, as on a fresh machine
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    os.environ["XDG_CACHE_HOME"] = environment["XDG_CACHE_HOME"]
    subprocess.run([*command, "--set", f"output.dir={folder}"], cwd=ROOT, env=environment, check=True)
    return folder


def dequantized_model(folder):
    """The source model with every quantized weight replaced by what our own reader makes of the files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(resolve_demo("demo:smollm2-135m"), dtype=torch.float32)
    checkpoint, scheme = Checkpoint.open(folder), LayerScheme(bits=4, group_size=64)
    tensors = checkpoint.read(checkpoint.entries)
    stems = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(stems) == 210
    for stem in stems:
        weight = compressed_tensors.unpack_linear(stem, tensors, scheme).dequantize()
        model.get_submodule(stem).weight.data.copy_(weight)
    return model


def test_source_is_sharded(run):
    assert len(list(resolve_demo("demo:smollm2-135m").glob("model-*.safetensors"))) >= 3


def test_perplexities_are_sane(run):
    summary = read_summary(run / "summary.json")
    original, quantized = summary.perplexity.original, summary.perplexity.quantized
    assert original < quantized < 1.15 * original
    assert summary.fallbacks == Fallbacks()


def test_plain_transformers_loads_it_and_agrees_with_our_dequantized_weights(run):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        run / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = dequantized_model(run / "model")
    tokens = load_file(run / "tokens.safetensors")["h0000"][:2]
    with torch.no_grad():
        theirs, expected = model(tokens).logits, ours(tokens).logits
    assert float((theirs - expected).norm() / expected.norm()) < 2**-8  # the rounding of bfloat16


def test_it_generates_text(run):
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


def test_verify_accepts_it(run):
    report = verify_model(run / "model", resolve_demo("demo:smollm2-135m"))
    assert report.num_linears == 210
    # GPTQ trades error of the weights for error of the outputs; weights that are wrong differ by 1 and more
    assert max(report.relative_weight_errors.values()) < 0.5
