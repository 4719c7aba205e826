"""A run from a quantized source writes what a run from the same weights in 16 bits writes, byte for byte."""

import pytest
import torch
import transformers

from astro.errors import UnsupportedError
from astro.storage.atomic import read_json, write_json
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from tests.support.architectures import IDS, logits_of, streamed_logits
from tests.support.families import ENCODED_MODELS
from tests.support.models import LLAMA, files_of, write_checkpoint
from tests.support.quantized_sources import SOURCES, write_source

LABELS = {
    "fp8-blocks": "21 from FP8 in blocks of 48 × 48 to bfloat16",
    "fp8-exponents": "21 from FP8 in blocks of 48 × 48 to bfloat16",
    "fp8-channels": "21 from FP8 by channel to bfloat16; 21 scales of activations",
    "mxfp4": "4 from MXFP4 in groups of 32 to bfloat16",
    "int4": "12 from 4-bit integers in groups of 32 to bfloat16",
    "nvfp4": "32 from NVFP4 in groups of 16 to bfloat16",
}


@pytest.fixture
def sources(tmp_path):
    def write(kind, section=None):
        config = ENCODED_MODELS.get(kind) or transformers.LlamaConfig(**LLAMA)
        model = write_checkpoint(tmp_path / "model", config, torch.bfloat16)
        write_source(model, kind, tmp_path / "encoded", tmp_path / "decoded", section)
        return tmp_path / "encoded", tmp_path / "decoded"

    return write


@pytest.mark.parametrize("kind", SOURCES)
def test_shards_are_those_of_the_decoded_source(sources, run_config, tmp_path, kind):
    encoded, decoded = sources(kind)
    shared = {"experts__min_tokens": 8, "quantization__bits": 3}
    expected = pipeline.quantize(run_config(model__source=str(decoded), output__dir=str(tmp_path / "a"), **shared))
    summary = pipeline.quantize(run_config(model__source=str(encoded), output__dir=str(tmp_path / "b"), **shared))
    assert files_of(tmp_path / "b" / "model") == files_of(tmp_path / "a" / "model")
    assert summary.perplexity == expected.perplexity
    stored = sum(tensor.size_bytes for tensor in Checkpoint.open(encoded).stored.values())
    assert 0.9 * stored < summary.bytes_read <= stored < expected.bytes_read
    assert any(LABELS[kind] in note for note in summary.notes)
    config = read_json(tmp_path / "b" / "model" / "config.json")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    errors = [verify_model(tmp_path / "b" / "model", source).relative_weight_errors for source in (encoded, decoded)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", SOURCES)
def test_streamed_logits_are_those_of_transformers_with_the_decoded_weights(sources, tmp_path, kind):
    encoded, decoded = sources(kind)
    assert torch.equal(streamed_logits(encoded, IDS, tmp_path, Checkpoint.open_source), logits_of(decoded, IDS)[0])


def test_logits_of_gpt_oss_are_those_that_transformers_decodes_itself(sources, tmp_path):
    """transformers reads the blocks and scales with its own code, in bfloat16."""
    encoded, decoded = sources("mxfp4")
    config = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        encoded, dtype=torch.bfloat16, quantization_config=config, experts_implementation="eager"
    )
    checkpoint = Checkpoint.open_source(encoded)
    state = theirs.state_dict()
    ours = checkpoint.read([weight.name for weight in checkpoint.encoded.weights])
    assert ours
    assert all(torch.equal(state[name], weight) for name, weight in ours.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(
        decoded, dtype=torch.bfloat16, experts_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, again(IDS).logits)


def test_quantization_config_inside_a_section_does_not_stay(sources, run_config, tmp_path):
    encoded, decoded = sources("fp8-blocks", "inner_config")
    pipeline.quantize(run_config(model__source=str(encoded)))
    pipeline.quantize(run_config(model__source=str(decoded), output__dir=str(tmp_path / "decoded-run")))
    shards, expected = (files_of(tmp_path / name / "model") for name in ("run", "decoded-run"))
    assert {k: v for k, v in shards.items() if k != "config.json"} == {
        k: v for k, v in expected.items() if k != "config.json"
    }
    config = read_json(tmp_path / "run" / "model" / "config.json")
    assert config["inner_config"] == {}
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_copies_are_decoded_too(tmp_path, run_config):
    """Layers for multi-token prediction lie behind the last block, in FP8 like the others."""
    model = write_checkpoint(tmp_path / "model", transformers.LlamaConfig(**LLAMA), torch.bfloat16)
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "num_hidden_layers": 2})
    write_source(model, "fp8-blocks", tmp_path / "encoded", tmp_path / "decoded")
    for name in ("encoded", "decoded"):
        pipeline.quantize(run_config(model__source=str(tmp_path / name), output__dir=str(tmp_path / f"run-{name}")))
    results = [tmp_path / f"run-{name}" / "model" for name in ("encoded", "decoded")]
    assert files_of(results[0]) == files_of(results[1])
    entry = Checkpoint.open(results[0]).entries["model.layers.2.mlp.down_proj.weight"]
    assert (entry.dtype, entry.shape) == ("BF16", (64, 128))


def test_bytes_from_the_hub_are_those_that_are_stored(sources, run_config, online_hub, tmp_path):
    encoded, decoded = sources("fp8-blocks")
    online_hub.publish("org/fp8", encoded)
    pipeline.quantize(run_config(model__source=str(decoded), output__dir=str(tmp_path / "local")))
    pipeline.quantize(run_config(model__source="org/fp8", model__cache_dir=str(tmp_path / "cache")))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "local" / "model")
    spans = [span for file, span in online_hub.file_requests if file.endswith(".safetensors")]
    heads = sum(stop - start + 1 for start, stop in spans if start == 0)
    stored = sum(tensor.size_bytes for tensor in Checkpoint.open(encoded).stored.values())
    assert sum(stop - start + 1 for start, stop in spans) - heads <= 1.05 * stored


def test_bytes_are_counted_as_stored_and_memory_in_16_bits(sources, run_config):
    encoded, decoded = sources("fp8-blocks")
    plans = [prepare(run_config(model__source=str(source))).plan for source in (encoded, decoded)]
    for ours, plain in zip(plans[0].blocks, plans[1].blocks, strict=True):
        assert ours.held_bytes == plain.held_bytes == plain.read_bytes
        assert plain.read_bytes / 2 < ours.read_bytes < 0.55 * plain.read_bytes
        assert ours.written_bytes == plain.written_bytes
    assert plans[0].written_bytes == plans[1].written_bytes


@pytest.mark.parametrize(("bits", "warned"), [(2, False), (3, False), (4, True)])
def test_rounding_4_bits_again_at_4_bits_is_said_to_be_of_no_use(sources, run_config, bits, warned):
    encoded, _ = sources("int4")
    notes = prepare(run_config(model__source=str(encoded), quantization__bits=bits)).notes
    assert any("4 bits already" in note for note in notes) == warned


def test_quantization_config_over_plain_weights_is_said_and_left_out(sources, run_config, tmp_path):
    _, decoded = sources("fp8-blocks")
    config = read_json(decoded / "config.json")
    write_json(decoded / "config.json", {**config, "quantization_config": SOURCES["fp8-blocks"][1]})
    notes = prepare(run_config(model__source=str(decoded))).notes
    assert any("every weight is stored in 16 or 32 bits" in note for note in notes)


def test_fp8_without_a_word_in_the_configuration_is_refused(sources, run_config):
    encoded, _ = sources("fp8-blocks")
    config = read_json(encoded / "config.json")
    del config["quantization_config"]
    write_json(encoded / "config.json", config)
    with pytest.raises(UnsupportedError, match="F8_E4M3.*config.json does not say how"):
        prepare(run_config(model__source=str(encoded)))
