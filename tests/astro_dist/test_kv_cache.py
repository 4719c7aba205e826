"""Scales of an FP8 cache are those of the calibration text, whoever measured them, and readers find them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.errors import CheckpointError, UnsupportedError
from astro.model.skeleton import Skeleton
from astro.storage.byte_store import FolderStore
from astro_dist import pipeline
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.export.cache_scales import CACHE_SCALES_NAME
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from astro_dist.report.command_output import verification_lines
from astro_dist.schedule.names import is_held_out
from astro_dist.source.resolve import Source

FP8 = {"activations__kv_cache": "fp8"}


def scales_of(config):
    return load_file(Path(pipeline.quantize(config).model) / CACHE_SCALES_NAME)


@torch.no_grad()
def test_scales_are_those_of_transformers_own_cache(run_config, llama):
    config = run_config(**FP8)
    scales = scales_of(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    chunks = load_file(config.output.dir / "tokens.safetensors")
    caches = [model(ids, use_cache=True).past_key_values for name, ids in chunks.items() if not is_held_out(name)]
    assert len(scales) == 2 * len(model.model.layers)
    for index in range(len(model.model.layers)):
        for name in ("k_scale", "v_scale"):
            held = [getattr(cache.layers[index], {"k_scale": "keys", "v_scale": "values"}[name]) for cache in caches]
            largest = max(float(tensor.abs().amax()) for tensor in held)
            assert float(scales[f"model.layers.{index}.self_attn.{name}"]) == pytest.approx(largest / 448, rel=1e-5)


@torch.no_grad()
def test_scales_fit_what_a_smoothed_result_caches(run_config):
    config = run_config(activations__smoothing="smoothquant", activations__bits=8, **FP8)
    scales = scales_of(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.output.dir / "model", dtype=torch.float32)
    chunks = load_file(config.output.dir / "tokens.safetensors")
    caches = [model(ids, use_cache=True).past_key_values for name, ids in chunks.items() if not is_held_out(name)]
    for index in range(len(model.model.layers)):
        largest = max(float(cache.layers[index].values.abs().amax()) for cache in caches)
        assert float(scales[f"model.layers.{index}.self_attn.v_scale"]) == pytest.approx(largest / 448, rel=0.2)


def test_the_cache_is_measured_as_it_is_served(run_config, tmp_path):
    exact = pipeline.quantize(run_config())
    rounded = pipeline.quantize(run_config(output__dir=str(tmp_path / "fp8"), **FP8))
    assert rounded.perplexity.original == exact.perplexity.original
    assert rounded.perplexity.quantized != exact.perplexity.quantized
    assert rounded.perplexity.quantized == pytest.approx(exact.perplexity.quantized, rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"execution__rounds": 2}, {"execution__mode": "sequential"}])
def test_workers_do_not_change_the_bytes(run_config, tmp_path, settings):
    configs = (run_config(output__dir=str(tmp_path / str(n)), execution__workers=n, **FP8, **settings) for n in (1, 2))
    models = [Path(pipeline.quantize(config).model) for config in configs]
    files = sorted(path.name for path in models[0].glob("*.safetensors"))
    assert CACHE_SCALES_NAME in files
    for name in files:
        assert (models[0] / name).read_bytes() == (models[1] / name).read_bytes(), name


def test_a_run_that_goes_on_keeps_what_it_saw(run_config):
    config = run_config(**FP8)
    model = Path(pipeline.quantize(config).model)
    before = (model / CACHE_SCALES_NAME).read_bytes()
    (config.output.dir / "model.json").unlink()
    (config.output.dir / "records" / "round-0-block-0001.json").unlink()
    (model / CACHE_SCALES_NAME).unlink()
    pipeline.quantize(config)
    assert (model / CACHE_SCALES_NAME).read_bytes() == before


def test_readers_take_the_scales(run_config, tmp_path):
    model = Path(pipeline.quantize(run_config(calibration__holdout_samples=0, **FP8)).model).rename(tmp_path / "alone")
    config = json.loads((model / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    assert verify_model(model).cache_scales == 6
    assert "6 scales of an FP8 cache" in " ".join(verification_lines(verify_model(model), None))
    scales = load_file(model / CACHE_SCALES_NAME)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == set(scales)  # it rounds no cache
    scales["model.layers.1.self_attn.v_scale"] *= -1
    save_file(scales, model / CACHE_SCALES_NAME)
    with pytest.raises(CheckpointError, match=r"1\.self_attn\.v_scale should be one positive number"):
        verify_model(model)


def test_judging_reads_a_model_with_scales(run_config):
    model = Path(pipeline.quantize(run_config(**FP8)).model)
    weights = BlockWeights(Source(FolderStore(model), model), Skeleton(model, torch.float32))
    block = weights.fill_block(1, torch.device("cpu"))
    assert torch.isfinite(block.self_attn.q_proj.weight).all()


def test_what_calibration_cannot_see_is_refused(run_config):
    with pytest.raises(UnsupportedError, match="kv_cache: fp8: nothing is quantized in block-0001"):
        prepare(run_config(quantization__ignore=["model.layers.1.*"], **FP8))
