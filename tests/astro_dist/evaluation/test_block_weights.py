"""Packed models of other tools are decoded as a source would be, or refused; never read as if they were ours."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.errors import CheckpointError
from astro.storage.bit_packing import pack
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.export.named_model import find_model
from tests.support.models import LLAMA, write_checkpoint

CPU = JudgeSettings(device="cpu", dtype="float32")
GROUP = 16


def write_packed(folder, packs, shuffles=False, changes=()):
    """Write a Llama as llm-compressor packs it, and return its weights as they are meant, in bfloat16."""
    path = next(write_checkpoint(folder, transformers.LlamaConfig(**LLAMA), shard="50MB").glob("*.safetensors"))
    stored, meant = {}, {}
    for name, W in load_file(path).items():
        if not name.endswith(packs):
            stored[name] = meant[name] = W
            continue
        order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(1))
        groups = (order if shuffles else torch.arange(W.shape[1])) // GROUP
        scale = torch.stack([W[:, groups == i].abs().amax(1) / 7 for i in range(W.shape[1] // GROUP)], 1).bfloat16()
        Q = (W / scale[:, groups].float()).round().clamp(-8, 7).to(torch.int8)
        shape = torch.tensor(W.shape)
        tensors = {"packed": pack(Q, 4), "scale": scale, "shape": shape, "g_idx": groups.int() if shuffles else None}
        stored |= {f"{name}_{ending}": tensor for ending, tensor in tensors.items() if tensor is not None}
        meant[name] = (Q.float() * scale[:, groups].float()).bfloat16().float()
    save_file(stored, path, {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    weights |= {"actorder": "group" if shuffles else None}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": [], **dict(changes),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize(
    ("packs", "shuffles"), [("proj.weight", True), (("proj.weight", "lm_head.weight"), False)], ids=["g_idx", "head"]
)
def test_packed_models_of_other_tools_are_decoded(tmp_path, packs, shuffles):
    meant = write_packed(tmp_path / "packed", packs, shuffles)
    model = StreamedModel(find_model(str(tmp_path / "packed")), CPU)
    block = model._weights.fill_block(1, model.device)
    with model.head_loaded():
        torch.testing.assert_close(model.skeleton.model.lm_head.weight, meant["lm_head.weight"], rtol=0, atol=0)
        for name, weight in block.named_parameters():
            torch.testing.assert_close(weight, meant[f"model.layers.1.{name}"], rtol=0, atol=0)


def test_rotated_models_are_refused(tmp_path):
    write_packed(tmp_path / "packed", "proj.weight", changes={"transform_config": {"config_groups": {"u": {}}}}.items())
    with pytest.raises(CheckpointError, match="rotated basis"):
        StreamedModel(find_model(str(tmp_path / "packed")), CPU)


def test_models_of_other_tools_in_gptq_layout_are_refused_with_what_to_do(llama):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="incomplete: KeyError.*give the original model"):
        StreamedModel(find_model(str(llama)), CPU)
