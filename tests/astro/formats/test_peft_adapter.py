import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from astro.errors import CheckpointError
from astro.formats.peft_adapter import CONFIG_NAME, WEIGHTS_NAME, adapter_config, layer_of, pack, unpack
from astro.model.low_rank import LowRank, attached

CORRECTIONS = {
    "first": LowRank(torch.rand(3, 6), torch.rand(5, 3)),
    "inner.1": LowRank(torch.rand(2, 5), torch.rand(4, 2)),
}
RANKS = {name: each.rank for name, each in CORRECTIONS.items()}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.inner = nn.ModuleList([nn.Identity(), nn.Linear(5, 4)])

    def forward(self, x):
        return self.inner[1](self.first(x).relu())


def test_what_is_packed_is_read_back():
    read = unpack(pack(CORRECTIONS))
    assert read.keys() == CORRECTIONS.keys()
    assert all(torch.equal(read[name].A, each.A) for name, each in CORRECTIONS.items())
    assert all(torch.equal(read[name].B, each.B) for name, each in CORRECTIONS.items())
    assert {layer_of(key) for key in pack(CORRECTIONS)} == CORRECTIONS.keys()


@torch.no_grad()
def test_peft_adds_the_corrections_and_nothing_else(tmp_path):
    save_file(pack(CORRECTIONS), tmp_path / WEIGHTS_NAME)
    content = {key: value for key, value in adapter_config(RANKS, None).items() if key != "task_type"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    x, model = torch.rand(7, 6), Model()
    before = model(x)
    with attached(model, CORRECTIONS, torch.float32):
        ours = model(x)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)(x)
    assert torch.allclose(theirs, ours, atol=1e-6)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_the_scaling_is_one_for_every_rank():
    content = adapter_config(RANKS, "org/model")
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (3, 3, False)
    assert content["rank_pattern"] == content["alpha_pattern"] == {"inner.1": 2}
    assert (content["target_modules"], content["base_model_name_or_path"]) == (["first", "inner.1"], "org/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.first.lora_A.weight"), "first: only one of its two factors"),
        (lambda t: t.update({"first.weight": torch.zeros(1)}), "first.weight is no tensor of a LoRA adapter"),
        (lambda t: t.update({"base_model.model.first.lora_B.weight": torch.zeros(5, 4)}), "first: expected factors"),
        (lambda t: t.update({"base_model.model.first.lora_B.weight": torch.zeros(5, 3).half()}), "of one dtype"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    tensors = pack(CORRECTIONS)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        unpack(tensors)
