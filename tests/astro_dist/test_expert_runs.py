"""Mixture-of-experts models: whole runs on tiny checkpoints."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from astro.calibration.hessian import HessianAccumulator
from astro.calibration.input_sums import InputSums
from astro.errors import ConfigError, NumericalError
from astro.formats import compressed_tensors
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.validate import prepare
from astro_dist.planning.worker_memory import WorkerMemory
from tests.support.architectures import EXPERTS
from tests.support.models import LLAMA, files_of, write_checkpoint

RUNS = {
    "mixtral": {
        "execution__mode": "blocks",
        "calibration__token_weights": "loss",
        "activations__bits": 4,
        "reconstruction__rank": 4,
    },
    "gpt-oss": {"execution__rounds": 2, "calibration__token_weights": "loss"},
    "qwen3-moe": {
        "execution__mode": "sequential",
        "calibration__token_weights": "loss",
        "activations__bits": 8,
        "activations__type": "float",
    },
    "llama4": {"execution__mode": "sequential", "execution__hessian_shares": 2, "calibration__token_weights": "loss"},
}


@pytest.fixture
def experts_config(run_config, tmp_path, monkeypatch):
    # No server takes rounded inputs of experts as small as these; the arithmetic is that of large ones.
    monkeypatch.setattr(compressed_tensors, "inputs_refusal", lambda *_: None)

    def build(name, min_tokens=150, policy="all-tokens", **changes):
        source = write_checkpoint(tmp_path / name, EXPERTS[name])
        config = run_config(model__source=str(source), quantization__group_size=16, **changes)
        experts = config.experts.__class__(min_tokens=min_tokens, policy=policy)
        return config.model_copy(update={"experts": experts})

    return build


def layers_of(summary):
    records = (Path(summary.model).parent / "records").glob("*block*.json")
    return [layer for record in records for layer in json.loads(record.read_text())["result"].get("layers", [])]


def test_experts_that_nothing_quantized_comes_before_read_behind_a_rounded_cache(experts_config, tmp_path):
    changes = {"execution__mode": "sequential", "execution__hessian_shares": 2, "activations__kv_cache": "fp8"}
    results = []
    for workers in (1, 3):
        changes |= {"execution__workers": workers, "output__dir": str(tmp_path / f"run{workers}")}
        summary = pipeline.quantize(experts_config("qwen3-moe", quantization__ignore=["*.self_attn.*"], **changes))
        results.append(files_of(Path(summary.model)))
    assert results[0] == results[1]
    assert any(layer["fallback"] == "all-tokens" for layer in layers_of(summary))


@pytest.mark.parametrize("name", RUNS)
def test_number_of_workers_does_not_change_a_byte(experts_config, tmp_path, name):
    results = []
    for workers in (1, 2, 5):
        folder = str(tmp_path / f"run{workers}")
        config = experts_config(name, execution__workers=workers, output__dir=folder, **RUNS[name])
        summary = pipeline.quantize(config)
        results.append(files_of(Path(summary.model)))
    assert results[0] == results[1] == results[2]
    verify_model(Path(summary.model), tmp_path / name)
    layers = layers_of(summary)
    assert any(layer["fallback"] == "all-tokens" for layer in layers)
    weighted = {(layer["fallback"] != "", ".experts." in layer["name"]): set() for layer in layers}
    for layer in layers:
        weighted[layer["fallback"] != "", ".experts." in layer["name"]].add(layer["token_weights"])
    of_experts = {} if name == "llama4" else {(False, True): {"loss"}}  # all of whose experts saw too few tokens
    assert weighted == {(True, True): {"norm"}, **of_experts, (False, False): {"loss"}}
    assert any("which tokens its experts are given" in note for note in summary.notes) == (name == "llama4")


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
@pytest.mark.parametrize(("policy", "bits"), [("shared-hessian", 16), ("shared-hessian", 4), ("rtn", 8)])
def test_policies_are_counted(experts_config, mode, policy, bits):
    config = experts_config("mixtral", policy=policy, execution__mode=mode, activations__bits=bits)
    summary = pipeline.quantize(config)
    used = Counter(layer["fallback"] for layer in layers_of(summary))
    assert 0 < used[policy] < 16
    assert len(summary.fallbacks.experts[policy]) == used[policy]
    rounded = [layer for layer in layers_of(summary) if layer["fallback"] == "rtn"]
    assert all(layer["beta"] == 0 and layer["num_tokens"] == 0 for layer in rounded)


WEIGHTED_BY_LOSS = {
    "calibration__token_weights": "loss", "calibration__chunk_samples": 1, "activations__bits": 8,
    "quantization__ignore": ["*.self_attn.*"], "quantization__method": "rtn", "quantization__scale_search": "minmax",
    "quantization__compensation": 0, "regularizer__name": "none",
}  # fmt: skip
"""Nothing quantized comes before the first block's experts, and no sum over tokens moves their grids."""
POLICIES = ["all-tokens", "shared-hessian", "rtn"]


@pytest.mark.parametrize("policy", POLICIES)
def test_sums_of_experts_are_finished_as_tokens_were_weighted_in_them(experts_config, monkeypatch, policy):
    """What errors of rounded inputs count for goes by the loss in all sums that are added up, or in none."""
    finished, absorbed = set(), set()
    real = {name: getattr(InputSums, name) for name in ("absorb_", "finish_")}

    def absorb(self, other):
        absorbed.add((self.token_weights, other.token_weights))
        real["absorb_"](self, other)

    def finish(self, name):
        finished.add((".experts." in name, self.token_weights))
        return real["finish_"](self, name)

    for name, spy in (("absorb_", absorb), ("finish_", finish)):
        monkeypatch.setattr(InputSums, name, spy)
    changes = {key: value for key, value in WEIGHTED_BY_LOSS.items() if key != "quantization__ignore"}
    layers = layers_of(pipeline.quantize(experts_config("mixtral", policy=policy, **changes)))
    assert any(layer["fallback"] == policy for layer in layers)
    # The loss says nothing of a token's way through an expert that it does not depend on.
    by_norm = {(True, "norm")} if policy == "all-tokens" else set()
    assert finished == {(False, "loss"), (True, "loss"), *by_norm}
    assert bool(absorbed) == (policy != "rtn")
    assert all(into == other for into, other in absorbed)


@pytest.mark.parametrize("policy", POLICIES)
def test_errors_of_experts_are_weighted_alike_in_every_mode(experts_config, tmp_path, policy):
    """The first experts read the same in both modes, here in one sum and there in three shares."""

    def errors(mode, **changes):
        folder = str(tmp_path / mode)
        summary = pipeline.quantize(
            experts_config(
                "mixtral", policy=policy, execution__mode=mode, output__dir=folder, **WEIGHTED_BY_LOSS, **changes
            )
        )
        experts = [layer for layer in layers_of(summary) if ".layers.0." in layer["name"] and ".w1" in layer["name"]]
        return {layer["name"]: layer for layer in experts}

    blocks, sequential = errors("blocks"), errors("sequential", execution__hessian_shares=3)
    assert blocks.keys() == sequential.keys()
    assert {layer["fallback"] for layer in blocks.values()} == {"", policy}
    for name, layer in blocks.items():
        assert sequential[name]["token_weights"] == layer["token_weights"]
        assert sequential[name]["fallback"] == layer["fallback"]
        assert sequential[name]["relative_error"] == pytest.approx(layer["relative_error"], rel=1e-4)
        assert sequential[name]["output_energy"] == pytest.approx(layer["output_energy"], rel=1e-4)


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_starved_expert_ends_the_run_where_that_is_asked(experts_config, mode):
    config = experts_config("mixtral", policy="fail", min_tokens=10_000, execution__mode=mode, execution__max_retries=0)
    with pytest.raises(NumericalError, match="calibration tokens reached this expert, experts.min_tokens is 10000"):
        pipeline.quantize(config)


def test_fused_experts_are_written_one_by_one_with_their_biases(experts_config, tmp_path):
    model = Path(pipeline.quantize(experts_config("gpt-oss")).model)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    experts = "model.layers.1.mlp.experts"
    assert f"{experts}.gate_up_proj" not in index
    assert f"{experts}.gate_up_proj_bias" not in index
    tensors = load_file(model / index[f"{experts}.2.w13_bias"])
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt-oss", dtype=torch.float32)
    assert torch.equal(tensors[f"{experts}.2.w13_bias"], source.get_parameter(f"{experts}.gate_up_proj_bias")[2])
    assert tuple(tensors[f"{experts}.2.w13_weight_packed"].shape) == (256, 8)


def test_gates_stay_as_they_are_and_servers_are_told(experts_config):
    summary = pipeline.quantize(experts_config("mixtral"))
    ignore = json.loads((Path(summary.model) / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate", "lm_head"} <= set(ignore)
    assert any("matrices that are gates, no linear layers" in note for note in summary.notes)


def test_fused_tensor_is_not_quantized_in_parts(experts_config):
    with pytest.raises(ConfigError, match="lies in one tensor with layers that are quantized"):
        prepare(experts_config("llama4", quantization__ignore=["*.experts.2.up_proj"]))


def test_experts_can_be_left_as_they_are(experts_config):
    summary = pipeline.quantize(experts_config("mixtral", quantization__ignore=["*.experts.*"]))
    assert len(layers_of(summary)) == 4
    verify_model(Path(summary.model))


def test_experts_of_a_layer_get_one_width(experts_config):
    config = experts_config(
        "mixtral", execution__rounds=2, quantization__bits="auto", quantization__average_bits=3.5,
        quantization__bit_choices=(2, 3, 4, 8),
    )  # fmt: skip
    summary = pipeline.quantize(config)
    widths: dict[str, set[int]] = {}
    for layer in layers_of(summary):
        if ".experts." in layer["name"] and layer["width_errors"] == {}:
            widths.setdefault(layer["name"].split(".experts.")[0], set()).add(layer["bits"])
    assert len(widths) == 2
    assert all(len(found) == 1 for found in widths.values())
    assert summary.average_bits <= 3.5
    assert not any("experts" in note and "differ" in note for note in summary.notes)


def test_what_readers_make_of_experts_is_told(experts_config):
    overrides = {"*.experts.1.*": {"bits": 8}}
    notes = prepare(experts_config("mixtral", quantization__overrides=overrides)).notes
    assert any("the experts of model.layers.0.block_sparse_moe.experts differ in width" in note for note in notes)
    notes = prepare(experts_config("gpt-oss", quantization__format="gptq")).notes
    assert any("leaves them random and says nothing" in note for note in notes)
    assert any("the source holds its experts fused" in note for note in notes)


@pytest.mark.parametrize("policy", ["per-channel", "keep"])
def test_layers_of_odd_widths_have_a_policy(run_config, tmp_path, policy):
    source = write_checkpoint(tmp_path / "odd", transformers.LlamaConfig(**{**LLAMA, "intermediate_size": 72}))
    changes = {"model__source": str(source), "quantization__group_size": 16}
    with pytest.raises(ConfigError, match="group_size 16 does not divide a layer of 72 input columns"):
        prepare(run_config(**changes))
    summary = pipeline.quantize(run_config(**changes, quantization__indivisible=policy))
    found = {layer["group_size"] for layer in layers_of(summary)}
    assert found == ({16, 72} if policy == "per-channel" else {16})
    assert any("layers whose input is no multiple of the group size" in note for note in summary.notes)
    verify_model(Path(summary.model))


def test_width_of_some_layers_of_experts_is_refused_before_a_budget_is_measured(experts_config):
    changes = {"quantization__bits": "auto", "quantization__average_bits": 5.0, "execution__rounds": 2}
    overrides = {"*.w2": {"bits": 8}}
    with pytest.raises(ConfigError, match="all experts of a layer get one width"):
        prepare(experts_config("mixtral", quantization__overrides=overrides, **changes))


def test_room_on_disk_is_that_of_the_largest_block(experts_config):
    """The first block of DeepSeek-V3 is dense."""
    prepared = prepare(experts_config("deepseek-v3"))
    blocks = prepared.plan.blocks
    turned = dataclasses.replace(prepared.plan, blocks=tuple(reversed(blocks)))
    sizes = [
        DiskSize(PlannedRun(plan, prepared.config, {"c0000": 64}, torch.float32, "cpu"))
        for plan in (prepared.plan, turned)
    ]
    assert sizes[0].most_bytes(2) == sizes[1].most_bytes(2)


def test_inputs_that_experts_keep_are_counted_as_they_are_kept(experts_config):
    """Weighted inputs are kept in float32 on a CPU, whatever the compute dtype."""
    sizes, kept = {}, {}
    for weights in ("norm", "none"):
        sizes_of_text = {"calibration__samples": 1, "calibration__sequence_length": 8}
        prepared = prepare(experts_config("mixtral", calibration__token_weights=weights, **sizes_of_text))
        memory = WorkerMemory(prepared.plan, prepared.config, torch.bfloat16, "cpu")
        experts = [batch for batch in memory._batches[0] if batch.reach < 1]
        sizes[weights] = sum(map(memory._statistics_bytes, experts))
        accumulator = HessianAccumulator(64, torch.device("cpu"), keep_inputs=True)
        accumulator.add_(torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(8) if weights == "norm" else None)
        kept[weights] = accumulator.kept_bytes
    assert sizes["norm"] / sizes["none"] == kept["norm"] / kept["none"] == 2
