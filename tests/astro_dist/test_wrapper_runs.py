"""Runs of models that take images, and of models with layers for multi-token prediction."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from astro.errors import CheckpointError
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from tests.support.architectures import IDS, streamed_logits
from tests.support.dequantized import write_dequantized
from tests.support.wrappers import WITH_DRAFTER, WRAPPERS, write_model

BROKEN_FORWARD = {"llama4"}
"""Wrappers whose forward fails without images: transformers 5.24 asks the output of the text model for images."""


def config_of(source: Path, run: Path, **quantization) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(source)},
            "quantization": {"group_size": 16, **quantization},
            "experts": {"min_tokens": 16},
            "calibration": {"samples": 6, "sequence_length": 48, "chunk_samples": 4, "holdout_samples": 2},
            "execution": {"executor": "local", "device": "cpu"},
            "output": {"dir": str(run)},
        }
    )


@torch.no_grad()
def loaded(folder, class_name):
    """Return the model as transformers loads it, and the names that it misses or does not expect."""
    model, info = getattr(transformers, class_name).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    return model, info


@torch.no_grad()
def logits_of(model, name):
    """Compute logits of a wrapper that is given text alone."""
    if name in BROKEN_FORWARD:
        with contextlib.suppress(AttributeError):
            model(input_ids=IDS, use_cache=False)  # the first forward unpacks the weights
        model = model.language_model
    return model(input_ids=IDS, use_cache=False).logits


def copied_matrices(model: Path) -> set[str]:
    """Return the names of all two-dimensional weights of a result that are not packed, as its files name them."""
    entries = Checkpoint.open(model).entries
    tables = re.compile(r"(embed_tokens|pos_embed|position_embedding)\.weight$")
    return {
        key.removesuffix(".weight")
        for key, entry in entries.items()
        if key.endswith(".weight") and len(entry.shape) == 2 and not tables.search(key)
    }


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_is_quantized_and_loads_in_its_own_class(tmp_path, name):
    source = write_model(tmp_path / "source", name)
    summary = pipeline.quantize(config_of(source, tmp_path / "run"))
    folder = Path(summary.model)
    original, _ = loaded(source, WRAPPERS[name][0])
    model, info = loaded(folder, WRAPPERS[name][0])
    assert not any(info.values())
    content = json.loads((folder / "config.json").read_text())
    assert content["architectures"] == [WRAPPERS[name][0]]
    assert copied_matrices(folder) <= set(content["quantization_config"]["ignore"])
    assert {"preprocessor_config.json", "processor_config.json"} <= {path.name for path in folder.iterdir()}
    assert verify_model(folder, against=source).num_linears
    card = (folder / "README.md").read_text()
    assert "calibrated and measured on text alone" in card
    assert "import AutoModelForImageTextToText, AutoProcessor" in card
    assert "pipeline_tag: image-text-to-text" in card
    expected = logits_of(original, name)
    assert torch.equal(streamed_logits(source, IDS, tmp_path), expected)
    write_dequantized(source, folder, tmp_path / "dequantized")
    ours, _ = loaded(tmp_path / "dequantized", WRAPPERS[name][0])
    torch.testing.assert_close(logits_of(model, name), logits_of(ours, name))


def test_joined_layers_of_a_vision_tower_are_named_as_servers_ask(tmp_path):
    ignore = prepare(config_of(write_model(tmp_path / "source", "glm4.5v"), tmp_path / "run")).plan.ignore
    for block in range(2):
        assert f"model.visual.blocks.{block}.attn.qkv_proj" in ignore
        assert f"model.visual.blocks.{block}.mlp.gate_up_proj" in ignore
    assert "model.visual.merger.gate_up_proj" in ignore
    assert not any("language_model" in name and name.endswith("gate_up_proj") for name in ignore)


@torch.no_grad()
def test_text_decoder_of_a_wrapper_loads_alone_too(tmp_path):
    """The causal class calls the decoder's layers by shorter names, and asks for what is not packed under these."""
    source = write_model(tmp_path / "source", "qwen3.5")
    summary = pipeline.quantize(config_of(source, tmp_path / "run"))
    _, info = loaded(Path(summary.model), "AutoModelForCausalLM")
    assert not info["missing_keys"]


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", WITH_DRAFTER)
def test_drafter_is_carried_over_and_every_matrix_of_it_is_named(tmp_path, name, format_name):
    source = write_model(tmp_path / "source", name)
    changes = {"format": format_name, "group_size": 32} if format_name == "gptq" else {}
    summary = pipeline.quantize(config_of(source, tmp_path / "run", **changes))
    folder = Path(summary.model)
    before, after = Checkpoint.open(source), Checkpoint.open(folder)
    drafter = [key for key in before.entries if re.match(r"mtp\.|model\.layers\.2\.", key)]
    for key, tensor in before.read(drafter).items():
        assert torch.equal(after.read([key])[key], tensor)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    named = json.dumps(content["quantization_config"]).replace("\\", "")
    stems = {key.removesuffix(".weight") for key in drafter if len(before.entries[key].shape) == 2}
    assert len(stems) > 7
    assert all(stem in named for stem in stems)
    assert "multi-token prediction" in summary.coverage.copied_bytes
    assert any("multi-token prediction" in note and "16 bits" in note for note in summary.notes)
    verify_model(folder)
    if format_name == "compressed-tensors":
        victim = sorted(stems)[0]
        content["quantization_config"]["ignore"].remove(victim)
        path.write_text(json.dumps(content))
        path.parent.rename(tmp_path / "alone")
        with pytest.raises(CheckpointError, match=re.escape(f"{victim} is neither packed nor in the config's ignore")):
            verify_model(tmp_path / "alone")


def test_what_text_never_enters_is_not_held_by_a_worker(tmp_path):
    plan = prepare(config_of(write_model(tmp_path / "source", "qwen3.5"), tmp_path / "run")).plan
    assert set(plan.outside) == {"lm_head.weight", "model.language_model.embed_tokens.weight",
                                 "model.language_model.norm.weight"}  # fmt: skip
    copied = [key for unit in plan.copies for key in unit.keys]
    assert any(key.startswith("model.visual.") for key in copied)
    assert any(key.startswith("mtp.") for key in copied)
    assert not plan.unknown
