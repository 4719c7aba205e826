"""A run is refused, or its needs are told, before anything starts."""

import pytest
import torch

from astro.errors import ConfigError, UnsupportedError
from astro_dist.config.schema import run_key
from astro_dist.planning.compute_dtype import compute_dtype
from astro_dist.planning.forecast import forecast
from astro_dist.planning.validate import prepare


def test_nothing_is_written_by_preparing(run_config, tmp_path):
    prepare(run_config())
    assert not (tmp_path / "run").exists()


def test_sequences_beyond_the_positions_of_the_model_are_refused(run_config):
    with pytest.raises(ConfigError, match=r"calibration.sequence_length: 1000000 is more than the \d+ positions"):
        prepare(run_config(calibration__sequence_length=1000000))


def test_sequences_of_automatic_length_fit_into_the_positions_of_the_model(run_config):
    prepared = prepare(run_config(calibration__sequence_length="auto"))
    assert prepared.config.calibration.sequence_length == 128
    assert "calibration.sequence_length: auto is 128, all positions of the model" in prepared.notes
    explicit = prepare(run_config(calibration__sequence_length=128)).config
    assert run_key(prepared.config, "", "") == run_key(explicit, "", "")


def test_a_revision_without_a_repository_is_refused(run_config):
    with pytest.raises(ConfigError, match=r"publish.repo: missing"):
        prepare(run_config(publish__revision="main"))


def test_gpus_must_be_named_where_the_configuration_wants_them(run_config):
    with pytest.raises(ConfigError, match="say which GPUs with --device"):
        forecast(prepare(run_config(execution__device="cuda")), 1, None)


def test_the_dtype_of_the_configuration_goes_before_the_stored_dtype(run_config):
    prepared = prepare(run_config(execution__compute_dtype="bfloat16"))
    assert compute_dtype(prepared.config, prepared.plan, prepared.checkpoint, "cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"overrides": {"*.q_proj": {"bits": 8}}}, "0.self_attn.q_proj and .* differ in width"),
     ({"ignore": ["*.up_proj"]}, "0.mlp.gate_proj and .* not all are quantized"),
     ({"bits": "auto", "average_bits": 5, "overrides": {"*.k_proj": {"bits": 8}}}, "0.self_attn.q_proj and .* differ")],
)  # fmt: skip
def test_gptq_with_other_schemes_for_parts_of_fused_layers_is_refused(run_config, settings, message):
    changes = {f"quantization__{key}": value for key, value in settings.items()} | {"execution__rounds": 2}
    with pytest.raises(ConfigError, match=f"overrides or ignore: model.layers.{message}"):
        prepare(run_config(quantization__format="gptq", **changes))
    assert any("vLLM fuses them" in note for note in prepare(run_config(**changes)).notes)


def test_gptq_with_one_scheme_for_fused_layers_is_content(run_config):
    overrides = {"*.self_attn.[qkv]_proj": {"bits": 8}, "*.mlp.down_proj": {"group_size": 64}}
    prepare(
        run_config(quantization__format="gptq", quantization__overrides=overrides, quantization__ignore=["*.o_proj"])
    )


def test_inputs_that_no_server_rounds_are_refused_before_the_start(run_config):
    with pytest.raises(UnsupportedError, match="activations: .*q_proj with .*, groups of 32: vLLM"):
        prepare(run_config(activations__bits=8, activations__type="float"))
    notes = prepare(run_config(activations__bits=8)).notes
    assert any("leaves inputs in 16 bits where weights have groups" in note for note in notes)
    assert not any("inputs in 16 bits" in note for note in prepare(run_config()).notes)


def test_what_servers_have_to_take_besides_weights_is_said_before_the_start(run_config):
    cached = prepare(run_config(activations__kv_cache="fp8")).notes
    assert sum("transformers ignores the scales" in note for note in cached) == 1
    corrected = prepare(run_config(reconstruction__rank=8)).notes
    assert sum("support LoRA for LlamaForCausalLM" in note for note in corrected) == 1
    aser = {"activations__bits": 8, "activations__smoothing": "aser", "quantization__group_size": -1}
    assert prepare(run_config(reconstruction__rank=32, **aser)).notes[0].startswith("CAREFUL")
    plain = prepare(run_config()).notes
    assert not any("LoRA" in note or "kv_cache" in note or "CAREFUL" in note for note in plain)
