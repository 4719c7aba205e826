"""Memory that is too little for a part of the model is no fault of its checkpoint."""

from types import SimpleNamespace

import pytest
import torch

from astro.model import skeleton as skeletons
from astro.model.skeleton import Skeleton
from astro.storage.checkpoint import Checkpoint

OUT = "CUDA out of memory. Tried to allocate 2.50 GiB."


def raised(*_):
    raise torch.OutOfMemoryError(OUT)


def kept_as_text(*_):
    errors = {"model.layers.0.mlp.experts.down_proj": f"Traceback ...\n{OUT}\nError: Stack on tensors"}
    return SimpleNamespace(mismatched_keys=(), conversion_errors=errors, error_msgs=()), None


@pytest.mark.parametrize("load", [raised, kept_as_text])
def test_out_of_memory_stays_what_it_is(llama, monkeypatch, load):
    skeleton, checkpoint = Skeleton(llama, torch.float32), Checkpoint.open(llama)
    monkeypatch.setattr(skeletons, "convert_and_load_state_dict_in_model", load)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2.50 GiB"):
        skeleton.load(skeleton.model, checkpoint.read(checkpoint.entries), torch.device("cpu"))
