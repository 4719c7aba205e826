"""Scales of an FP8 cache are those of the calibration text, whoever measured them, and readers find them."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.errors import CheckpointError, RunError, UnsupportedError
from astro.model.cache_scales import CacheScales
from astro.model.kv_cache import rounded_cache
from astro.model.skeleton import Skeleton
from astro.storage.atomic import write_json
from astro.storage.byte_store import FolderStore
from astro_dist import pipeline
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.export.cache_scales import CACHE_SCALES_NAME
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from astro_dist.report.command_output import figure_lines, verification_lines
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import read_summary
from astro_dist.run_directory.unit_record import BlockResult, UnitRecord
from astro_dist.schedule.names import is_held_out
from astro_dist.source.resolve import Source
from astro_dist.worker import stage_inputs
from tests.support.interruption import interrupted_after

FP8 = {"activations__kv_cache": "fp8"}
ROUNDS = {"execution__rounds": 2}
SEQUENTIAL = {"execution__mode": "sequential", "execution__hessian_shares": 2}


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
    assert read_summary(tmp_path / "fp8" / "summary.json").also_rounded == ("FP8 cache",)
    assert " with FP8 cache, " in figure_lines(rounded)[0]
    assert " with " not in figure_lines(exact)[0]


@pytest.mark.parametrize("settings", [{}, {"execution__rounds": 2}, {"execution__mode": "sequential"}])
def test_workers_do_not_change_the_bytes(run_config, tmp_path, settings):
    configs = (run_config(output__dir=str(tmp_path / str(n)), execution__workers=n, **FP8, **settings) for n in (1, 2))
    models = [Path(pipeline.quantize(config).model) for config in configs]
    files = sorted(path.name for path in models[0].glob("*.safetensors"))
    assert CACHE_SCALES_NAME in files
    for name in files:
        assert (models[0] / name).read_bytes() == (models[1] / name).read_bytes(), name


@pytest.mark.parametrize("settings", [{}, {"execution__rounds": 2}, SEQUENTIAL])
def test_scales_are_in_the_record_of_their_block(run_config, settings):
    config = run_config(**FP8, **settings)
    scales = scales_of(config)
    run = RunDirectory(config.output.dir, "", rounds=config.execution.rounds)
    for (round_index, block), result in run.blocks().items():
        ((name, recorded),) = result.cache_scales.items()
        assert name == f"model.layers.{block}.self_attn"
        if round_index == run.rounds - 1:
            stored = [float(scales[f"{name}.{part}"]) for part in ("k_scale", "v_scale")]
            assert [recorded.key, recorded.value] == pytest.approx(stored, rel=1e-6)
    assert not (config.output.dir / "kv_cache").exists()


@pytest.mark.parametrize("settings", [{}, SEQUENTIAL])
def test_a_record_with_other_scales_is_no_record(run_config, settings):
    config = run_config(**FP8, **settings)
    before = scales_of(config)
    (config.output.dir / "model.json").unlink()
    record = config.output.dir / "records" / "round-0-block-0001.json"
    content = json.loads(record.read_text())
    content["result"]["cache_scales"]["model.layers.1.self_attn"]["key"] *= 2
    record.write_text(json.dumps(content))
    after = scales_of(config)
    assert all(torch.equal(after[name], scale) for name, scale in before.items())
    assert "round-0-block-0001" in (config.output.dir / "journal.jsonl").read_text().partition('"damaged"')[2]


@pytest.mark.parametrize(("settings", "calls"), [({}, 13), (SEQUENTIAL, 40), (ROUNDS, 25), (ROUNDS, 100)])
def test_run_goes_on_only_with_records_that_tell_their_scales(run_config, settings, calls):
    config = run_config(**FP8, **settings)
    if calls < 100:
        with interrupted_after(calls):
            pipeline.quantize(config)
    else:
        pipeline.quantize(config)
        (config.output.dir / "model.json").unlink()
    record = max((config.output.dir / "records").glob("round-*-block-0000.json"))
    written = UnitRecord.from_json(json.loads(record.read_text()))
    assert isinstance(written.result, BlockResult)
    without = dataclasses.replace(written, result=dataclasses.replace(written.result, cache_scales=None))
    write_json(record, without.to_json())
    with pytest.raises(RunError, match=rf"{record.stem}: its record does not tell the scales of an FP8 cache"):
        pipeline.quantize(config)


@pytest.mark.parametrize(("settings", "calls"), [({}, 13), (SEQUENTIAL, 40)])
def test_files_of_another_run_change_no_scale(run_config, tmp_path, settings, calls):
    expected = scales_of(run_config(output__dir=str(tmp_path / "whole"), **FP8, **settings))
    config = run_config(**FP8, **settings)
    with interrupted_after(calls):
        pipeline.quantize(config)
    run = RunDirectory(config.output.dir, "")
    assert 0 < len(run.blocks()) < 3, "it ended between blocks"
    for block in range(3):
        content = {f"model.layers.{block}.self_attn": [1e4, 1e4]}
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        path = run.root / "kv_cache" / f"round-0-block-{block:04d}" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    found = scales_of(config)
    assert all(torch.equal(found[name], scale) for name, scale in expected.items())


def packed(config, layer):
    tensors = {}
    for path in Path(pipeline.quantize(config).model).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors[f"model.layers.0.{layer}.weight_packed"]


ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj"]


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"execution__rounds": 2}, []),
        (SEQUENTIAL, []),
        ({**SEQUENTIAL, "quantization__compensation": 0.0}, []),
        (SEQUENTIAL, ATTENTION),
        (SEQUENTIAL, [*ATTENTION, "*.o_proj"]),
    ],
)
def test_layers_behind_attention_learn_from_the_rounded_cache(run_config, tmp_path, settings, ignored):
    """Nothing else differs in the first block, where both runs begin with the same embeddings."""
    configs = [
        run_config(output__dir=str(tmp_path / name), quantization__ignore=ignored, **settings, **changes)
        for name, changes in (("exact", {}), ("fp8", FP8))
    ]
    behind = "mlp.gate_proj" if "*.o_proj" in ignored else "self_attn.o_proj"
    assert not torch.equal(*(packed(config, behind) for config in configs))
    if not ignored:
        assert torch.equal(*(packed(config, "self_attn.v_proj") for config in configs))


@torch.no_grad()
def test_in_sequence_every_layer_reads_what_the_server_computes(run_config, monkeypatch):
    read, real = {}, stage_inputs.inputs_of

    def noting(layers, operands, action, is_enough=None):
        inputs = real(layers, operands, action, is_enough)
        for operand, of_operand in inputs.items():
            read.setdefault(operand.names[0], []).append(of_operand.X.clone())
        return inputs

    monkeypatch.setattr(stage_inputs, "inputs_of", noting)
    config = run_config(**FP8, **SEQUENTIAL, quantization__compensation=0.0)
    scales = scales_of(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.output.dir / "model", dtype=torch.float32)
    by_module = {
        layer.self_attn: CacheScales(
            *(float(scales[f"model.layers.{i}.self_attn.{n}"]) for n in ("k_scale", "v_scale"))
        )
        for i, layer in enumerate(model.model.layers)
    }
    expected = {}
    for name, module in model.named_modules():
        if name in read:
            module.register_forward_pre_hook(lambda _, args, name=name: expected.setdefault(name, []).append(args[0]))
    with rounded_cache(by_module):
        chunks = load_file(config.output.dir / "tokens.safetensors")
        for chunk in sorted(name for name in chunks if not is_held_out(name)):
            model(chunks[chunk])
    assert {name.rpartition(".")[2] for name in read} == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    for name, chunks in read.items():
        for X, server in zip(chunks, expected[name], strict=True):
            torch.testing.assert_close(X, server, atol=1e-4, rtol=0, msg=name)


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


@pytest.mark.parametrize("parts", [("k_scale", "v_scale"), ("v_scale",)])
def test_attention_without_a_scale_is_refused(run_config, tmp_path, parts):
    model = Path(pipeline.quantize(run_config(calibration__holdout_samples=0, **FP8)).model).rename(tmp_path / "alone")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    scales = load_file(model / CACHE_SCALES_NAME)
    for part in parts:
        name = f"model.layers.1.self_attn.{part}"
        del scales[name], index["weight_map"][name]
    save_file(scales, model / CACHE_SCALES_NAME)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=rf"model\.layers\.1\.self_attn has no {parts[0]}, and config.json asks for"
    ):
        verify_model(model)


def test_judging_reads_a_model_with_scales(run_config):
    model = Path(pipeline.quantize(run_config(**FP8)).model)
    weights = BlockWeights(Source(FolderStore(model), model), Skeleton(model, torch.float32))
    block = weights.fill_block(1, torch.device("cpu"))
    assert torch.isfinite(block.self_attn.q_proj.weight).all()


def test_what_calibration_cannot_see_is_refused(run_config):
    with pytest.raises(UnsupportedError, match="kv_cache: fp8: nothing is quantized in block-0001"):
        prepare(run_config(quantization__ignore=["model.layers.1.*"], **FP8))
