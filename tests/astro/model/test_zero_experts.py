"""LongCat's experts that pass their input on: files of the Hub have no weights of them, files of transformers do."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

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
