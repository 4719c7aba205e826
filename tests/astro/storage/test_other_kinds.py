"""Places that are no model: one message each, which says what the place is and what to give."""

import pytest

from astro.errors import CheckpointError
from astro.storage.checkpoint import Checkpoint

CACHE = "hub/models--org--llama/snapshots/0123abc/model.safetensors"


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        ([CACHE, "hub/models--org--other/refs/main"], "hub",
         r"hub: is the Hub's cache of 2 models, not a model; give .* such as org/llama"),
        ([CACHE, "hub/models--org--llama/refs/main"], "hub/models--org--llama",
         r"is a folder of the Hub's cache, not a model; give org/llama as model.source, or a folder in .*/snapshots"),
        ([CACHE], "hub/models--org--llama/snapshots", "give org/llama as model.source"),
        (["m/adapter_config.json", "m/adapter_model.safetensors"], "m", r"is an adapter \(LoRA\), .* merge it"),
        (["m/adapter_model.bin"], "m", r"is an adapter \(LoRA\)"),
        (["m/consolidated.safetensors", "m/params.json"], "m", "holds consolidated.safetensors, .* its maker's own"),
        (["m/consolidated.00.pth", "m/consolidated.01.pth"], "m", "holds consolidated.00.pth, .* its maker's own"),
        (["m/model-00002-of-00009.safetensors", "m/model-00003-of-00009.safetensors"], "m",
         "holds 2 shards, the first is model-00002-of-00009.safetensors, but not model.safetensors.index.json"),
        (["m/weights.safetensors"], "m", "holds weights.safetensors but no model.safetensors"),
        (["m/model_index.json", "m/unet/model.safetensors"], "m", "is a pipeline of diffusers"),
        (["m/pytorch_model.bin"], "m", "holds pytorch_model.bin but no safetensors"),
        (["m/a.gguf"], "m", "a GGUF file holds weights"),
        (["m/run.json", "m/model/model-00001-of-00002.safetensors"], "m", r"is the directory of a run; .*m/model"),
        (["m/llama/model.safetensors"], "m", r"holds no model itself, but .*m/llama holds weights"),
        (["m/config.json"], "m", "holds neither model.safetensors.index.json nor model.safetensors"),
    ],
)  # fmt: skip
def test_what_a_place_is_and_what_to_give(tmp_path, files, place, message):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path / place)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs, not the shard; run `git lfs pull`"):
        Checkpoint.open(tmp_path)
