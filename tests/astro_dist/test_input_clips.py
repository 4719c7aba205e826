"""Runs whose inputs are rounded between clips that training learned: from the checkpoint to readers of the result."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import fake_quantize
from safetensors.torch import load_file, save_file

from astro.activation_regularization import ActivationRegularizer
from astro.errors import CheckpointError, ConfigError
from astro.model.clipped_rounding import round_clipped
from astro.model.clips_file import CLIPS_FILE, write_clips
from astro.training_config import ActivationRegularization
from astro_dist import pipeline
from astro_dist.config.training import TrainConfig
from astro_dist.evaluation.block_weights import BlockWeights
from astro_dist.evaluation.comparison import compare_runs
from astro_dist.export.adapter_file import ADAPTER_WEIGHTS
from astro_dist.export.finished_run import FinishedRun
from astro_dist.export.input_scales import INPUT_SCALES_NAME
from astro_dist.export.inventory import read_inventory
from astro_dist.export.verify import verify_model
from astro_dist.planning.predicted_groups import predicted_input_groups, stages_of
from astro_dist.planning.validate import prepare
from astro_dist.report.findings import Findings
from astro_dist.run_directory.summary import read_summary
from astro_dist.training.train import train
from astro_dist.worker.worker import Worker
from tests.astro_dist.evaluation.test_text_loss import assert_judged_as_measured
from tests.astro_dist.test_pipeline import perplexity
from tests.support.architectures import EXPERTS
from tests.support.dequantized import write_dequantized
from tests.support.interruption import interrupted_after
from tests.support.models import LLAMA, byte_tokenizer, files_of, write_checkpoint

CLIPS = {"activations__bits": 4, "activations__clips": "from-checkpoint"}
SEQUENTIAL = {"execution__mode": "sequential", "execution__hessian_shares": 2}
LOSS = {"calibration__token_weights": "loss"}
MODES = {
    "blocks": LOSS,
    "rounds": {"execution__rounds": 2, "activations__kv_cache": "fp8"},
    "sequential": {**SEQUENTIAL, **LOSS},
    "rounded, asymmetric": {"quantization__method": "rtn", "quantization__symmetric": False},
    "corrected": {"reconstruction__rank": 4, **SEQUENTIAL},
}
IDS = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(5))
CPU = torch.device("cpu")


def linears_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def dense(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def write_measured_clips(folder, bits=4):
    """Write clips as a training might leave them: a part of what each layer reads, no two layers alike."""
    model, clips = dense(folder), {}

    def note(name):
        def hook(_, args):
            ends = torch.stack([args[0].quantile(0.02), args[0].quantile(0.96)])
            clips[name] = ends * (1 - 0.01 * len(clips))

        return hook

    for name, module in linears_of(model).items():
        module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(IDS)
    write_clips(folder / CLIPS_FILE, clips, bits)
    return clips


@pytest.fixture
def clips(llama):
    return write_measured_clips(llama)


def model_of(summary):
    return Path(summary.model)


@torch.no_grad()
def rounding_as_in_training(folder, clips):
    """A dense model whose inputs the hooks of training round, between the clips as they were learned."""
    model = dense(folder)
    regularizer = ActivationRegularizer(model, ActivationRegularization(), CPU)
    regularizer.clips.data = torch.stack([clips[name] for name in regularizer.names])
    return model


@pytest.mark.parametrize("mode", MODES)
def test_run_is_the_same_with_any_workers_and_is_judged_as_it_was_measured(run_config, llama, clips, tmp_path, mode):
    results = []
    for workers in (1, 2):
        changes = {**CLIPS, **MODES[mode], "execution__workers": workers}
        summary = pipeline.quantize(run_config(**changes, output__dir=str(tmp_path / f"run{workers}")))
        results.append(files_of(model_of(summary)))
    assert results[0] == results[1]
    assert verify_model(model_of(summary)).inputs.in_words == "int4 between learned clips"
    assert_judged_as_measured(tmp_path / "run2", llama)


@pytest.mark.parametrize(("mode", "calls"), [("blocks", 13), ("sequential", 14), ("sequential", 30)])
def test_interrupted_run_goes_on_and_writes_the_same_bytes(run_config, clips, tmp_path, mode, calls):
    whole = pipeline.quantize(run_config(**CLIPS, **MODES[mode], output__dir=str(tmp_path / "whole")))
    with interrupted_after(calls):
        pipeline.quantize(run_config(**CLIPS, **MODES[mode]))
    summary = pipeline.quantize(run_config(**CLIPS, **MODES[mode], execution__workers=2))
    assert files_of(model_of(summary)) == files_of(model_of(whole))


def test_run_with_other_clips_does_not_go_on(run_config, llama, clips):
    pipeline.quantize(run_config(**CLIPS))
    write_clips(llama / CLIPS_FILE, {name: 2 * each for name, each in clips.items()}, 4)
    with pytest.raises(ConfigError, match=r"SHA-256 of the learned clips .*: [0-9a-f]{64} there, [0-9a-f]{64} here"):
        pipeline.quantize(run_config(**CLIPS))


def test_measured_perplexity_is_that_of_trainings_rounding(run_config, llama, clips, tmp_path, monkeypatch):
    summary = pipeline.quantize(run_config(**CLIPS))
    write_dequantized(llama, model_of(summary), tmp_path / "dequantized")
    held_out = [
        row for name, rows in load_file(tmp_path / "run/tokens.safetensors").items() if name[0] == "h" for row in rows
    ]
    with torch.no_grad():
        expected = perplexity(rounding_as_in_training(tmp_path / "dequantized", clips), held_out)
        unrounded = perplexity(dense(tmp_path / "dequantized"), held_out)
    assert summary.perplexity.quantized == pytest.approx(expected, rel=1e-5)
    assert abs(unrounded / expected - 1) > 1e-3
    monkeypatch.setattr(BlockWeights, "rounding", lambda self, *indices: nullcontext())
    with pytest.raises(AssertionError):
        assert_judged_as_measured(tmp_path / "run", llama)


@torch.no_grad()
def test_transformers_rounds_as_training_did(run_config, llama, clips, tmp_path):
    folder = model_of(pipeline.quantize(run_config(**CLIPS)))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    write_dequantized(llama, folder, tmp_path / "dequantized")
    expected = rounding_as_in_training(tmp_path / "dequantized", clips)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    assert (dense(tmp_path / "dequantized")(IDS).logits - expected).norm() > 1e-2 * expected.norm()
    X = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    for name, layer in linears_of(model).items():
        args = layer.quantization_scheme.input_activations
        assert (args.num_bits, args.strategy, args.symmetric, args.dynamic) == (4, "tensor", False, False)
        found = fake_quantize(X, layer.input_scale, layer.input_zero_point, args)
        torch.testing.assert_close(found, round_clipped(X, clips[name], 4), atol=1e-5, rtol=0)
        assert len(found.unique()) == 16


def test_weights_stay_as_they_were_trained_for_rounded_inputs(run_config, llama, clips, tmp_path):
    fine = {**CLIPS, "quantization__bits": 8, "regularizer__name": "none"}
    assert prepare(run_config(**fine)).config.quantization.compensation == 0
    assert prepare(run_config(**fine, quantization__compensation=0.5)).config.quantization.compensation == 0.5
    errors = {}
    for compensation in ("auto", 1.0):
        folder = tmp_path / str(compensation)
        run = run_config(**fine, quantization__compensation=compensation, output__dir=str(folder))
        errors[compensation] = verify_model(model_of(pipeline.quantize(run)), llama).relative_weight_errors
    assert max(errors["auto"].values()) < 0.02
    assert min(errors[1.0].values()) > 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_corrections_bring_back_no_inputs_for_which_weights_were_not_trained(run_config, llama, bits):
    write_measured_clips(llama, bits)
    fine = {"quantization__bits": 8, "regularizer__name": "none", "reconstruction__rank": 8}
    clipped = {**CLIPS, "activations__bits": bits}
    sizes = {}
    for compensation in ("auto", 1.0):
        folder = llama.parent / f"run-{compensation}"
        run = run_config(**fine, **clipped, quantization__compensation=compensation, output__dir=str(folder))
        factors = load_file(model_of(pipeline.quantize(run)) / ADAPTER_WEIGHTS)
        pairs = [(B, factors[name.replace("lora_B", "lora_A")]) for name, B in factors.items() if "lora_B" in name]
        sizes[compensation] = [float((B @ A).norm()) for B, A in pairs]
    weights = [float(module.weight.detach().norm()) for module in linears_of(dense(llama)).values()]
    assert max(sizes["auto"]) < 0.01 * min(weights)
    assert min(sizes[1.0]) > 2 * max(sizes["auto"])


def test_layers_that_read_one_input_have_a_hessian_each(run_config, clips):
    summary = pipeline.quantize(run_config(**CLIPS, **LOSS))
    layers = Findings.read(model_of(summary).parent).layers
    assert sorted(layer.name for layer in layers) == sorted(clips)
    assert {layer.token_weights for layer in layers} == {"loss"}


def test_parts_of_a_block_are_as_foretold(run_config, clips, monkeypatch):
    stages, real = [], Worker.do_part

    def do_part(self, call):
        parts = real(self, call)
        if self._solver._block is not None:
            stages.append(self._solver._block.layout)
        return parts

    monkeypatch.setattr(Worker, "do_part", do_part)
    config = run_config(**CLIPS, **SEQUENTIAL)
    pipeline.quantize(config)
    expected = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [[name.rpartition(".")[2] for (name,) in stage] for stage in stages[0]] == expected
    predicted = predicted_input_groups(prepare(config).plan.blocks[0].linears, 1.0)
    assert [len(stage) for stage in stages_of(predicted)] == [len(stage) for stage in expected]


def test_what_inputs_are_is_said(run_config, clips):
    config = run_config(**CLIPS, quantization__ignore=["model.layers.2.*"])
    notes = " ".join(prepare(config).notes)
    assert "int4 between learned clips: no server that we know of takes such inputs, and vLLM 0.32 refuses" in notes
    assert "14 layers round their inputs between clips of their own" in notes
    assert (
        "7 layers have clips and are not quantized; their inputs stay as they are, the first is model.layers.2."
        in notes
    )
    run = FinishedRun.open(model_of(pipeline.quantize(config)).parent)
    assert run.summary.inputs == "int4 between learned clips"
    assert compare_runs([run.run.root]).runs[0].also_rounded == "inputs int4 between learned clips"
    card = run.card("org/model")
    assert f"| int4 between learned clips, a pair for each layer, in {INPUT_SCALES_NAME} |" in card.text
    assert "No server has kernels for inputs between learned clips." in card.text
    assert "It has to be float32: in bfloat16 transformers rounds the grids of inputs too" in card.text
    assert 'from_pretrained("org/model", device_map="auto", dtype="float32")' in card.text
    assert "vllm" not in card.data.tags
    assert INPUT_SCALES_NAME in {file.name for file in read_inventory(run.run)}


def test_source_without_clips_is_refused(run_config, llama):
    with pytest.raises(
        ConfigError, match=r"llama/activation_clips.safetensors is not there; `astro-dist train` writes"
    ):
        prepare(run_config(**CLIPS))


@pytest.mark.parametrize(("bits", "what"), [(8, "set activations.bits: 8"), (3, "train with input_bits: 4 or 8")])
def test_clips_of_another_width_are_refused(run_config, llama, bits, what):
    write_measured_clips(llama, bits)
    with pytest.raises(ConfigError, match=f"activations.bits: 4, but the clips in .* learned for {bits} bits; {what}"):
        prepare(run_config(**CLIPS))


def test_quantized_layers_without_clips_are_refused(run_config, llama, clips):
    del clips["model.layers.1.mlp.up_proj"], clips["model.layers.2.self_attn.k_proj"]
    write_clips(llama / CLIPS_FILE, clips, 4)
    message = (
        r"clips of 19 layers, and of 2 quantized layers none, the first is model.layers.1.mlp.up_proj; training left"
    )
    with pytest.raises(CheckpointError, match=message):
        prepare(run_config(**CLIPS))
    prepare(run_config(**CLIPS, quantization__ignore=["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj"]))


def test_experts_that_share_a_parameter_are_refused(run_config, tmp_path):
    source = write_checkpoint(tmp_path / "mixtral", EXPERTS["mixtral"])
    clips = write_measured_clips(source)
    with pytest.raises(
        CheckpointError, match=rf"clips of {len(clips)} layers, and of \d+ quantized layers none, the first"
    ):
        prepare(run_config(model__source=str(source), **CLIPS))


def test_clips_that_are_no_range_are_refused(run_config, llama, clips):
    clips["model.layers.1.mlp.up_proj"] = torch.tensor([2.0, 2.0])
    write_clips(llama / CLIPS_FILE, clips, 4)
    with pytest.raises(
        CheckpointError, match=r"safetensors: model.layers.1.mlp.up_proj: clips are 2 and 2, expected two"
    ):
        prepare(run_config(**CLIPS))


def test_result_without_the_grid_of_a_layer_is_refused(run_config, clips, tmp_path):
    folder = model_of(pipeline.quantize(run_config(**CLIPS))).rename(tmp_path / "alone")
    grids, name = load_file(folder / INPUT_SCALES_NAME), "model.layers.1.mlp.up_proj.input_scale"
    save_file({**grids, name: torch.zeros(1)}, folder / INPUT_SCALES_NAME)
    with pytest.raises(CheckpointError, match=f"{name} should be one number"):
        verify_model(folder)
    del grids[name]
    save_file(grids, folder / INPUT_SCALES_NAME)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{name} is missing: config.json says"):
        verify_model(folder)


def test_trained_model_is_quantized_with_its_clips(run_config, tmp_path):
    source = tmp_path / "untrained"
    transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2}, eos_token_id=257).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    content = {
        "model": {"source": str(source)},
        "text": {"sequence_length": 32},
        "optimization": {"steps": 6, "batch_sequences": 4, "micro_batch_sequences": 2, "warmup_steps": 2},
        "execution": {"executor": "local", "device": "cpu"},
        "output": {"dir": str(tmp_path / "training")},
    }
    trained = train(TrainConfig.model_validate(content))
    words = shlex.split(trained.lines()[-1])
    assert words[:3] == ["astro-dist", "quantize", trained.model]
    told = dict(word.replace(".", "__").split("=") for word in words[3:] if "=" in word)
    assert told == {"activations__bits": "4", "activations__clips": "from-checkpoint"}
    run = model_of(pipeline.quantize(run_config(model__source=trained.model, **CLIPS))).parent
    assert read_summary(run / "summary.json").inputs == "int4 between learned clips"
    assert_judged_as_measured(run, trained.model)


def test_clips_are_read_from_the_hub(run_config, llama, clips, online_hub, tmp_path):
    online_hub.publish("org/llama", llama)
    remote = run_config(model__source="org/llama", model__cache_dir=str(tmp_path / "cache"), **CLIPS)
    blocks = [prepare(config).plan.blocks for config in (remote, run_config(**CLIPS))]
    grids = [[linear.clips for unit in each for linear in unit.linears] for each in blocks]
    assert grids[0] == grids[1]
    assert all(grids[0])
