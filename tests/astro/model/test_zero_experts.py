"""LongCat's experts that pass their input on: files of the Hub have no weights of them, files of transformers do."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from astro.errors import UnsupportedError
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.planning.validate import prepare
from tests.support.architectures import EXPERTS, IDS, logits_of, streamed_logits
from tests.support.dequantized import keys_of
from tests.support.families import examine
from tests.support.models import write_checkpoint

ZERO_EXPERT = re.compile(r"\.experts\.[45]\.")


def as_on_the_hub(source, folder):
    """Copy a checkpoint without the projections of zero experts, and return its folder."""
    folder.mkdir()
    checkpoint = Checkpoint.open(source)
    tensors = checkpoint.read(key for key in checkpoint.entries if not ZERO_EXPERT.search(key))
    assert len(checkpoint.entries) - len(tensors) == 2 * 2 * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def sources(tmp_path):
    source = write_checkpoint(tmp_path / "saved", EXPERTS["longcat-flash"])
    return source, as_on_the_hub(source, tmp_path / "hub")


@pytest.fixture
def transformers_that_reads_the_hub(monkeypatch):
    """Make the experts' class ask for no weights of zero experts, as the files of the Hub want it."""
    build = LongcatFlashExperts.__init__

    def build_without(self, config):
        build(self, config)
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.detach()[: self.num_routed_experts].clone())

    monkeypatch.setattr(LongcatFlashExperts, "__init__", build_without)


def test_both_kinds_of_files_give_the_logits_of_transformers(sources, tmp_path):
    expected = logits_of(sources[0], IDS)[0]
    assert torch.equal(streamed_logits(sources[0], IDS, tmp_path), expected)
    assert torch.equal(streamed_logits(sources[1], IDS, tmp_path), expected)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # else the notes are false
        logits_of(sources[1], IDS)


def test_layers_are_those_of_the_experts_that_compute(sources):
    for source in sources:
        checkpoint, skeleton = Checkpoint.open(source), Skeleton(source, torch.float32)
        layers, others = skeleton.linear_layers(1, keys_of(skeleton, checkpoint, 1))
        experts = [layer.name for layer in layers if layer.expert is not None]
        assert len(experts) == 4 * 3
        assert not any(ZERO_EXPERT.search(name) for name in experts)
        assert others == ["model.layers.1.mlp.router.classifier.weight"]
        assert skeleton.expert_share == 2 / 6


def test_both_kinds_of_files_give_the_same_result(sources, run_config, tmp_path):
    results = []
    for source in sources:
        config = run_config(
            model__source=str(source), output__dir=str(tmp_path / f"run-{source.name}"), quantization__group_size=32
        )
        results.append(Checkpoint.open(Path(pipeline.quantize(config).model)))
    saved, hub = results
    assert saved.entries.keys() == hub.entries.keys()
    assert not any(ZERO_EXPERT.search(key) for key in saved.entries)
    for key, tensor in saved.read(saved.entries).items():
        assert torch.equal(tensor, hub.read([key])[key]), key


def fused(source, folder):
    """Copy a checkpoint with the experts of a block in two tensors, and return its folder."""
    folder.mkdir()
    checkpoint = Checkpoint.open(source)
    tensors = checkpoint.read(checkpoint.entries)
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        parts = {
            part: [tensors.pop(key) for e in range(6) if (key := f"{experts}.{e}.{part}.weight") in tensors]
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{experts}.gate_up_proj"] = torch.stack(
            [torch.cat(rows) for rows in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        )
        tensors[f"{experts}.down_proj"] = torch.stack(parts["down_proj"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_fused_experts_without_zero_experts_are_read_and_with_them_refused(sources, run_config, tmp_path):
    saved, hub = (fused(source, tmp_path / f"fused-{source.name}") for source in sources)
    assert torch.equal(streamed_logits(hub, IDS, tmp_path), logits_of(sources[0], IDS)[0])
    prepare(run_config(model__source=str(hub), quantization__group_size=32))
    with pytest.raises(UnsupportedError, match=r"gate_up_proj is \[6, 64, 64\]: its last 2 experts pass"):
        prepare(run_config(model__source=str(saved), quantization__group_size=32))


def test_user_is_told_what_is_left_out_and_who_reads_the_result(sources, run_config):
    saved, hub = (prepare(run_config(model__source=str(source), quantization__group_size=32)) for source in sources)
    assert [note for note in saved.notes if note.startswith("8 tensors of experts that pass their input on")]
    assert not [note for note in hub.notes if "left out" in note]
    for prepared in (saved, hub):
        assert [note for note in prepared.notes if "reads neither such files nor the result" in note]
        assert not any(ZERO_EXPERT.search(name) for name in prepared.plan.ignore)


@pytest.mark.slow
def test_result_is_what_the_class_makes_of_it(sources, transformers_that_reads_the_hub, tmp_path):
    result = examine(sources[1], tmp_path / "scratch")
    assert (result.failures, result.missing, result.unexpected) == ({}, set(), set())
    assert result.streamed == 0
    assert result.difference < 1e-5
