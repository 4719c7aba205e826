"""`verify` finds what a loader would stumble over."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from astro.activation_config import ActivationScheme
from astro.errors import CheckpointError, ConfigError
from astro.model.skeleton import Skeleton
from astro.storage.byte_store import FolderStore
from astro.storage.checkpoint import INDEX_NAME
from astro_dist import pipeline
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.export.verify import verify_model
from astro_dist.report.command_output import verification_lines
from astro_dist.source import long_wait
from astro_dist.source.resolve import Source


@pytest.fixture
def run_model(run_config):
    """In its run directory, whose checksums are compared."""
    return Path(pipeline.quantize(run_config(calibration__holdout_samples=0)).model)


@pytest.fixture
def model(run_model, tmp_path):
    """Alone."""
    return run_model.rename(tmp_path / "alone")


def change_tensor(folder, key, change):
    """Replace one tensor, or drop it where `change` returns None, and keep the index true."""
    index = json.loads((folder / INDEX_NAME).read_text())
    path = folder / index["weight_map"][key]
    tensors = load_file(path)
    tensor = change(tensors.pop(key))
    if tensor is None:
        del index["weight_map"][key]
    else:
        tensors[key] = tensor
    save_file(tensors, path)
    (folder / INDEX_NAME).write_text(json.dumps(index))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{Q}.weight_scale", lambda t: None, r"missing model\.layers\.1\.self_attn\.q_proj\.weight_scale"),
        (f"{Q}.weight_scale", lambda t: t * float("nan"), "weight_scale holds NaN or Inf"),
        (f"{Q}.weight_scale", lambda t: t * 0, "has scales that are zero"),
        (f"{Q}.weight_packed", lambda t: t[:, 1:].contiguous(), "expected 8 words a row"),
        (f"{Q}.weight_packed", lambda t: None, r"no tensor for model\.layers\.1\.self_attn\.q_proj\.weight"),
        (f"{Q}.weight_shape", lambda t: torch.tensor([32, 128]), "weight_scale should be"),
        (f"{Q}.weight_packed", lambda t: t[0].contiguous(), "weight_packed should have two dimensions"),
        ("model.norm.weight", lambda t: t * float("inf"), r"model\.norm\.weight holds NaN or Inf"),
        ("model.norm.weight", lambda t: None, r"no tensor for model\.norm\.weight"),
        ("model.norm.weight", lambda t: t[1:].contiguous(), r"model\.norm\.weight should be \[64\], got \[63\]"),
    ],
)
def test_damage_is_found(model, key, change, message):
    change_tensor(model, key, change)
    with pytest.raises(CheckpointError, match=message):
        verify_model(model)


def test_checksums_of_a_run_are_compared(run_model):
    assert verify_model(run_model).checksums_compared
    path = run_model / "model-00002-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="00002-of-00004.* not as the run wrote it .* in all 1 of 10 files"):
        verify_model(run_model)
    path.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00004.* is gone.*`astro-dist quantize`"):
        verify_model(run_model)


def test_how_far_a_verification_is_is_said(run_model, llama, monkeypatch, caplog):
    monkeypatch.setattr(long_wait, "_EVERY_S", 0.0)
    caplog.set_level("INFO", "astro_dist")
    verify_model(run_model, llama)
    lines = [line.partition(": ")[2] for line in caplog.messages]
    number = len([*run_model.iterdir()])
    assert lines[number].endswith(" tensors are read, 0.0 GB")
    assert set(lines[:number]) == {"compared 0.0 of 0.0 GB with the run's SHA-256"}
    assert "checked for NaN 0.0 of 0.0 GB" in lines
    assert lines[-21:] == [f"unpacked {done} of 21 layers" for done in range(1, 22)]


def test_checksums_are_those_of_the_folder_that_is_meant(run_model, tmp_path):
    (tmp_path / "link").symlink_to(run_model)
    assert verify_model(tmp_path / "link").checksums_compared
    shutil.copytree(run_model, run_model.parent / "edited")
    (run_model.parent / "edited" / "README.md").write_text("mine")
    assert not verify_model(run_model.parent / "edited").checksums_compared


def test_model_of_a_run_that_is_not_finished(run_model):
    (run_model.parent / "model.json").unlink()
    for name in (run_model, run_model.parent):
        with pytest.raises(ConfigError, match="its run is not finished; `astro-dist status"):
            verify_model(name)


def test_nan_in_what_the_class_does_not_read_is_said(model):
    index = json.loads((model / INDEX_NAME).read_text())
    for number, value in ((8, float("nan")), (9, 1.0)):
        name = f"mtp.layers.{number}.norm.weight"
        save_file({name: torch.full((64,), value)}, model / f"extra-{number}.safetensors")
        index["weight_map"][name] = f"extra-{number}.safetensors"
    (model / INDEX_NAME).write_text(json.dumps(index))
    verification = verify_model(model)
    assert verification.not_finite == ("mtp.layers.8.norm.weight",)
    assert verification.to_json()["not_finite"] == ["mtp.layers.8.norm.weight"]
    assert "1 tensor that the model's class does not read" in verification_lines(verification, None)[0]


def test_model_that_lost_a_shard(model):
    assert not verify_model(model).checksums_compared
    next(model.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing; fetch it again$"):
        verify_model(model)


def test_layer_that_is_there_twice(model):
    index = json.loads((model / INDEX_NAME).read_text())
    path = model / index["weight_map"][f"{Q}.weight_packed"]
    save_file({**load_file(path), f"{Q}.weight": torch.ones(64, 64)}, path)
    index["weight_map"][f"{Q}.weight"] = path.name
    (model / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="q_proj.weight is there beside its packed tensors"):
        verify_model(model)


def test_config_without_its_ignore_list(model):
    content = json.loads((model / "config.json").read_text())
    content["quantization_config"]["ignore"] = []
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lm_head is neither packed nor in the config's ignore list"):
        verify_model(model)


def test_model_that_is_not_quantized(llama):
    with pytest.raises(CheckpointError, match="has no quantization_config, so this is no quantized model"):
        verify_model(llama)


def test_wrong_source(model, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is not the source of this model"):
        verify_model(model, tmp_path)


def test_rounded_inputs_are_read_back(run_config, tmp_path):
    config = run_config(calibration__holdout_samples=0, activations__bits=8)
    model = Path(pipeline.quantize(config).model).rename(tmp_path / "alone")
    verified = verify_model(model)
    assert (verified.inputs, verified.to_json()["inputs"]) == (ActivationScheme(8, "int"), "int8 per token")
    assert "round the inputs of packed layers: int8 per token" in verification_lines(verified, None, False)[-2]
    assert BlockWeights(Source(FolderStore(model), model), Skeleton(model, torch.float32)).inputs == verified.inputs
    change_groups(model, lambda group: group["input_activations"].update(dynamic=False))
    with pytest.raises(CheckpointError, match=r"config\.json: input_activations: expected .*'strategy': 'tensor'"):
        verify_model(model)


def change_groups(model, change):
    content = json.loads((model / "config.json").read_text())
    for group in content["quantization_config"]["config_groups"].values():
        change(group)
    (model / "config.json").write_text(json.dumps(content))
