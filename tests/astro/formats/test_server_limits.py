"""What servers ask for besides packed weights is said: FP8 caches, and adapters."""

import pytest

from astro.activation_config import Activations, Reconstruction
from astro.formats.server_limits import adapter_notes, cache_notes

ASER = Activations(bits=8, smoothing="aser")


def test_an_fp8_cache_says_who_takes_it_and_who_ignores_it():
    (note,) = cache_notes(Activations(kv_cache="fp8"))
    assert "vLLM 0.32 takes such a cache" in note
    assert "compute capability 8.0 or more by FlashInfer" in note
    assert "round queries to FP8 too, which is not measured" in note
    assert "transformers ignores the scales" in note
    assert cache_notes(Activations()) == []


def test_an_adapter_says_what_servers_have_to_support_and_what_was_tried():
    (note,) = adapter_notes(Reconstruction(rank=16), Activations(), "FooForCausalLM")
    assert "support LoRA for FooForCausalLM" in note
    assert "SmolLM2 with 4-bit weights and inputs in 16 bits" in note
    assert note.endswith("not tried: GPUs, other architectures")
    (rounded,) = adapter_notes(Reconstruction(rank=16), Activations(bits=8), "FooForCausalLM")
    assert rounded.endswith("not tried: GPUs, other architectures, inputs in int8 per token")
    assert adapter_notes(Reconstruction(), Activations(bits=8), "FooForCausalLM") == []


@pytest.mark.parametrize(("rank", "is_loud"), [(32, True), (16, False)])
def test_a_model_that_is_useless_without_its_adapter_says_so_loudly(rank, is_loud):
    (note,) = adapter_notes(Reconstruction(rank=rank), ASER, "FooForCausalLM")
    assert note.startswith("CAREFUL: without its adapter this model is of no use") == is_loud
    assert ("the model works and loses more" in note) != is_loud
