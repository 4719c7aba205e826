"""gpt-oss from end to end: its packed experts as vLLM loads them, read here without this project's code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

from astro.errors import CheckpointError
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from tests.support.architectures import EXPERTS, IDS
from tests.support.dequantized import write_dequantized
from tests.support.models import write_checkpoint


@pytest.fixture
def config(run_config, tmp_path):
    def build(**changes):
        source = tmp_path / "source"
        if not source.exists():
            write_checkpoint(source, EXPERTS["gpt-oss"], dtype=torch.bfloat16)
        return run_config(model__source=str(source), quantization__group_size=32, **changes)

    return build


def weight(tensors, stem, rows, columns):
    """Unpack a weight [rows, columns] with compressed-tensors' own function, and scale it."""
    packed, scale = tensors[f"{stem}weight_packed"], tensors[f"{stem}weight_scale"].float()
    integers = unpack_from_int32(packed, 8, torch.Size([rows, columns])).float()
    return integers * scale.repeat_interleave(columns // scale.shape[1], dim=1)


def read_by_others(model):
    """Return the state of the model: experts as vLLM takes them, one row of gate after each row of up and so on."""
    checkpoint = Checkpoint.open(model)
    tensors = checkpoint.read(checkpoint.entries)
    state = {key: tensor for key, tensor in tensors.items() if "packed" not in key and "weight_s" not in key}
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        w13 = [weight(tensors, f"{experts}.{e}.w13_", 256, 64) for e in range(4)]
        w2 = [weight(tensors, f"{experts}.{e}.w2_", 64, 128) for e in range(4)]
        state[f"{experts}.gate_up_proj"] = torch.stack([W.T for W in w13])
        state[f"{experts}.down_proj"] = torch.stack([W.T for W in w2])
        for name, part in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            state[f"{experts}.{name}_bias"] = torch.stack([state.pop(f"{experts}.{e}.{part}_bias") for e in range(4)])
        for name, rows, columns in (("q", 64, 64), ("k", 32, 64), ("v", 32, 64), ("o", 64, 64)):
            stem = f"model.layers.{block}.self_attn.{name}_proj."
            state[f"{stem}weight"] = weight(tensors, stem, rows, columns)
    return state


@torch.no_grad()
def test_experts_are_those_of_the_source_and_logits_those_of_our_weights(config, tmp_path):
    model = Path(pipeline.quantize(config(quantization__bits=8)).model)
    state = read_by_others(model)
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    for name, parameter in source.named_parameters():
        exact = parameter.float()
        assert state[name].shape == exact.shape
        assert float((state[name] - exact).norm() / exact.norm()) < 0.02, name
    write_dequantized(tmp_path / "source", model, tmp_path / "ours")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    source.load_state_dict({name: tensor.bfloat16() for name, tensor in state.items()})
    assert torch.equal(source(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    verify_model(model, tmp_path / "source")


def test_names_are_those_that_vllm_loads(config):
    model = Path(pipeline.quantize(config()).model)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    prefix = "model.layers.1.mlp.experts."
    parts = ("weight_packed", "weight_scale", "bias")
    expected = {f"{prefix}{e}.{layer}_{part}" for e in range(4) for layer in ("w13", "w2") for part in parts}
    assert {name for name in index if name.startswith(prefix)} == expected


def test_config_speaks_of_the_layers_by_which_vllm_asks(config):
    changes = {"quantization__overrides": {"*.experts.*": {"bits": 8}}, "quantization__ignore": ["*.0.mlp.experts.*"]}
    model = Path(pipeline.quantize(config(**changes)).model)
    written = json.loads((model / "config.json").read_text())["quantization_config"]
    targets = {name for group in written["config_groups"].values() for name in group["targets"]}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert {f"model.layers.1.mlp.experts.3.{part}" for part in parts} <= targets
    assert {f"model.layers.0.mlp.experts.3.{part}" for part in parts} <= set(written["ignore"])
    assert not any("w13" in name or "w2" in name for name in (*targets, *written["ignore"]))
    verify_model(model)


@pytest.mark.parametrize("ending", ["w13_weight_scale", "w2_weight_scale", "w13_bias", "w2_bias"])
def test_nan_among_joined_experts_is_unsound(config, tmp_path, ending):
    model = shutil.copytree(pipeline.quantize(config()).model, tmp_path / "damaged")
    name = f"model.layers.1.mlp.experts.2.{ending}"
    path = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = torch.nan
    verify_model(model)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} .*NaN"):
        verify_model(model)


def test_layout_that_nobody_reads_is_told(config):
    notes = prepare(config(quantization__format="gptq")).notes
    assert any("no reader of gpt-oss's packed experts" in note for note in notes)
