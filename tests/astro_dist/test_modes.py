"""Rounds, mode `sequential`, overrides and a width budget: whole runs on a tiny checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from astro.errors import ConfigError, RunError, UnsupportedError
from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from astro_dist.report.findings import Findings
from astro_dist.report.html import write_report
from astro_dist.report.status import read_status
from astro_dist.run_directory.records import RunDirectory
from astro_dist.run_directory.summary import read_summary
from astro_dist.schedule.calls import (
    Backward,
    DifferentiateLoss,
    MergeHessians,
    OpenBlock,
    SolveBlock,
    SolveRows,
    TryBetas,
    WeighTokens,
    WriteBlock,
)
from astro_dist.worker import token_weigher
from astro_dist.worker.split_solver import SplitSolver
from astro_dist.worker.worker import Worker
from tests.astro_dist.test_pipeline import perplexity
from tests.support.interruption import interrupted_after
from tests.support.models import files_of

SEQUENTIAL = {"execution__mode": "sequential", "execution__hessian_shares": 2}
STAGES = {"execution__mode": "stages"}
LOSS = {"calibration__token_weights": "loss"}
EVERYTHING = {
    "activations__bits": 8,
    "activations__smoothing": "aser",
    "activations__kv_cache": "fp8",
    "reconstruction__rank": 4,
}
MODES = {
    "blocks": {},
    "loss": LOSS,
    "loss, rounds": {**LOSS, "execution__rounds": 2},
    "loss, sequential": {**LOSS, **SEQUENTIAL},
    "smoothed": {**LOSS, "activations__bits": 8, "activations__smoothing": "smoothquant"},
    "smoothed, sequential": {**SEQUENTIAL, "activations__bits": 8, "activations__smoothing": "aser"},
    "smoothed, rounds": {"execution__rounds": 2, "activations__bits": 8, "activations__smoothing": "smoothquant"},
    "rounds": {"execution__rounds": 3, "quantization__bits": 3},
    "sequential": {**SEQUENTIAL, "quantization__bits": 3},
    "uncompensated": {**SEQUENTIAL, "quantization__compensation": 0.0},
    "rounded": {**SEQUENTIAL, "quantization__method": "rtn"},
    "corrected": {"reconstruction__rank": 4, "execution__rounds": 2},
    "corrected, sequential": {"reconstruction__rank": "auto", "reconstruction__energy": 0.5, **SEQUENTIAL},
    "budget": {"execution__rounds": 2, "quantization__bits": "auto", "quantization__average_bits": 3.5},
    "inputs, rounds": {"execution__rounds": 2, "activations__bits": 8},
    "inputs, sequential": {**SEQUENTIAL, "activations__bits": 4, "quantization__group_size": 64},
    "corrected inputs": {
        "reconstruction__rank": 4,
        "execution__rounds": 2,
        "activations__bits": 4,
        "quantization__group_size": 64,
    },
    "everything": {**LOSS, **EVERYTHING, "execution__rounds": 2},
    "everything, sequential": {**SEQUENTIAL, **EVERYTHING, "activations__bits": 4, "quantization__group_size": 64},
    "tuned": {"quantization__tune_steps": 3, "quantization__bits": 3},
    "tuned, rounds": {**LOSS, "execution__rounds": 2, "quantization__tune_steps": 3, "activations__bits": 8},
    "tuned, sequential": {**SEQUENTIAL, **EVERYTHING, "quantization__tune_steps": 3},
    "stages": {**STAGES, "quantization__bits": 3},
    "loss, stages": {**STAGES, **LOSS, "quantization__tune_steps": 3},
    "everything, stages": {**STAGES, **LOSS, **EVERYTHING, "activations__bits": 4, "quantization__group_size": 64},
    "overrides": {
        **SEQUENTIAL,
        "quantization__overrides": {"*.v_proj": {"bits": 8}, "*.mlp.*": {"group_size": 64, "symmetric": False}},
    },
}


def model_of(summary):
    return Path(summary.model)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("mode", MODES)
def test_number_of_workers_does_not_change_a_byte(run_config, tmp_path, monkeypatch, mode):
    results, split, real = [], [], Worker.split_block
    monkeypatch.setattr(Worker, "split_block", lambda self, call: split.append(call) or real(self, call))
    for workers in (1, 2, 5):
        folder = str(tmp_path / f"run{workers}")
        config = run_config(execution__workers=workers, output__dir=folder, **MODES[mode])
        summary = pipeline.quantize(config)
        results.append(files_of(model_of(summary)))
        assert workers > 1 or not split
    assert results[0] == results[1] == results[2]
    assert bool(split) == (config.execution.mode == "blocks"), "they solve a block together"
    verify_model(model_of(summary))
    assert not (tmp_path / "run1" / "activations").exists()
    assert not (tmp_path / "run1" / "rounds").exists()


@pytest.mark.parametrize("mode", ["rounds", "sequential"])
def test_block_of_which_nothing_is_quantized_is_written_as_it_is(run_config, llama, tmp_path, mode):
    results = []
    for workers in (1, 5):
        changes = {**MODES[mode], "output__dir": str(tmp_path / f"run{workers}"), "execution__workers": workers}
        summary = pipeline.quantize(run_config(quantization__ignore=["model.layers.1.*"], **changes))
        results.append(files_of(model_of(summary)))
    assert results[0] == results[1]
    verify_model(model_of(summary))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(Checkpoint.open(model_of(summary)).read([name])[name], Checkpoint.open(llama).read([name])[name])


def test_worker_that_begins_a_block_keeps_nothing_of_what_it_helped_with(run_config, monkeypatch):
    real, kept = Worker.open_block, []

    def open_block(self, call):
        helped = self._solver._block is not None
        real(self, call)
        kept.append((helped, self._solver._block))

    monkeypatch.setattr(Worker, "open_block", open_block)
    pipeline.quantize(run_config(execution__workers=5, **MODES["rounds"]))
    assert any(helped for helped, _ in kept)
    assert not any(block for _, block in kept)


WHOLE = {}
"""Files of a run that nothing happened to, by mode: every test has the same model."""


def whole(run_config, tmp_path, mode):
    if mode not in WHOLE:
        config = run_config(output__dir=str(tmp_path / "whole"), **MODES[mode])
        WHOLE[mode] = files_of(model_of(pipeline.quantize(config)))
    return WHOLE[mode]


@pytest.mark.parametrize(
    ("mode", "calls", "workers"),
    [
        *(("blocks", calls, 1) for calls in (1, 8, 14)),
        *(("rounds", calls, 1) for calls in (9, 35)),
        *(("sequential", calls, 1) for calls in (2, 9, 23)),
        *(("budget", calls, 1) for calls in (9, 35)),
        *(("corrected", calls, 1) for calls in (9, 35)),
        *(("corrected, sequential", calls, 1) for calls in (9, 23)),
        *(("rounds", calls, 5) for calls in (25, 46)),
        *(("loss", calls, 1) for calls in (1, 5, 8, 9, 13, 20)),
        *(("loss", calls, 5) for calls in (6, 15)),
        *(("loss, sequential", calls, 1) for calls in (11, 30)),
        *(("smoothed", calls, 1) for calls in (1, 2, 5, 8, 12, 20)),
        *(("smoothed", calls, 5) for calls in (6, 15)),
        *(("smoothed, sequential", calls, 1) for calls in (4, 11, 30)),
        ("inputs, rounds", 35, 5),
        *(("tuned", calls, workers) for calls, workers in ((9, 1), (14, 1), (15, 5))),
        ("tuned, sequential", 25, 1),
        ("everything", 20, 5),
        ("everything", 55, 1),
        ("everything, sequential", 25, 1),
        ("inputs, sequential", 14, 1),
        *(("stages", calls, 1) for calls in (1, 8, 9)),
        *(("loss, stages", calls, workers) for calls, workers in ((8, 1), (14, 1), (18, 1), (12, 5))),
        ("everything, stages", 20, 5),
    ],
)
def test_interrupted_run_goes_on_and_writes_the_same_bytes(run_config, tmp_path, mode, calls, workers):
    expected = whole(run_config, tmp_path, mode)
    with interrupted_after(calls):
        pipeline.quantize(run_config(execution__workers=workers, **MODES[mode]))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").glob("*.json")}
    summary = pipeline.quantize(run_config(execution__workers=2, **MODES[mode]))
    assert files_of(model_of(summary)) == expected
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "records").glob("*.json")}
    assert before.items() <= after.items(), "a finished unit was done again"
    assert read_status(tmp_path / "run").state == "complete"


@pytest.mark.parametrize("mode", ["rounds", "sequential", "uncompensated"])
def test_perplexity_of_the_last_round_is_that_of_what_was_written(run_config, tmp_path, mode):
    summary = pipeline.quantize(run_config(**MODES[mode]))
    model = transformers.AutoModelForCausalLM.from_pretrained(model_of(summary), dtype=torch.float32)
    tokens = load_file(tmp_path / "run" / "tokens.safetensors")["h0000"]
    assert perplexity(model, tokens) == pytest.approx(summary.perplexity.quantized, rel=1e-5)
    assert summary.rounds[-1].perplexity == summary.perplexity.quantized
    assert len(summary.rounds) == (3 if mode == "rounds" else 1)


def test_first_round_is_the_run_of_one_round_and_later_ones_differ(run_config, tmp_path, monkeypatch):
    one = pipeline.quantize(run_config(output__dir=str(tmp_path / "one"), quantization__bits=3))
    two = pipeline.quantize(run_config(execution__rounds=2, quantization__bits=3))
    assert two.rounds[0].perplexity == pytest.approx(one.perplexity.quantized, rel=1e-9)
    assert files_of(model_of(one)) != files_of(model_of(two))


@pytest.mark.parametrize("mode", ["tuned", "tuned, rounds", "tuned, sequential"])
def test_tuning_is_recorded_and_lowers_the_error_of_every_block(run_config, tmp_path, mode):
    changes = MODES[mode]
    summary = pipeline.quantize(run_config(**{**changes, "quantization__tune_steps": 10}))
    findings = Findings.read(tmp_path / "run")
    words = "scales of 3 blocks were tuned in 10 steps"
    assert words in (model_of(summary) / "README.md").read_text()
    assert words.capitalize() in write_report(findings).read_text()
    for (round_index, _), block in findings.rounds.items():
        is_last = round_index + 1 == changes.get("execution__rounds", 1)
        assert (block.tuning is not None) == is_last == ("tune" in block.seconds)
        if block.tuning is not None:
            assert (block.tuning.steps, block.tuning.reason) == (10, "")
            assert 0 < block.tuning.after < block.tuning.before < 1
    assert "tuning" not in (tmp_path / "run" / "records").joinpath("embed.json").read_text()
    without = pipeline.quantize(
        run_config(**{**changes, "quantization__tune_steps": 0, "output__dir": str(tmp_path / "w")})
    )
    tuned, plain = (Checkpoint.open(model_of(each)) for each in (summary, without))
    name = "model.layers.0.mlp.up_proj.weight_"
    key, scale = f"{name}packed", f"{name}scale"
    assert torch.equal(tuned.read([key])[key], plain.read([key])[key])
    assert not torch.equal(tuned.read([scale])[scale], plain.read([scale])[scale])


def test_compensation_lowers_the_loss_of_the_tiny_model_at_two_bits(run_config, tmp_path):
    results = {}
    for share in (0.0, 0.5):
        changes = {**SEQUENTIAL, "quantization__bits": 2, "quantization__compensation": share}
        config = run_config(output__dir=str(tmp_path / str(share)), calibration__samples=24, **changes)
        results[share] = model_of(pipeline.quantize(config))
    tokens = load_file(tmp_path / "0.5" / "tokens.safetensors")["c0000"]
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)

    def distance(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return float((model(tokens).logits - source(tokens).logits).square().mean())

    assert distance(results[0.5]) < distance(results[0.0])


def test_share_to_make_up_for_is_measured_where_the_text_has_two_halves(run_config, tmp_path):
    for shares in (1, 2):
        folder = tmp_path / str(shares)
        changes = {**MODES["sequential"], "execution__hessian_shares": shares, "output__dir": str(folder)}
        pipeline.quantize(run_config(**changes))
        layers = [layer for block in RunDirectory(folder, "").blocks().values() for layer in block.layers]
        measured = {layer.compensation for layer in layers}
        assert measured == {0.25} if shares == 1 else len(measured) > 3
        assert all(0 <= share <= 1 for share in measured)


def test_budget_is_spent_and_not_exceeded(run_config, tmp_path):
    summary = pipeline.quantize(run_config(**MODES["budget"]))
    assert 3.0 < summary.average_bits <= 3.5
    widths = json.loads((tmp_path / "run" / "allocation.json").read_text())
    assert len(widths) == 21
    for i in range(3):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        assert len({widths[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert widths[f"{mlp}.gate_proj"] == widths[f"{mlp}.up_proj"]
    written = {
        target: group["weights"]["num_bits"]
        for group in config_of(model_of(summary))["config_groups"].values()
        for target in group["targets"]
    }
    assert written == widths
    _, info = transformers.AutoModelForCausalLM.from_pretrained(model_of(summary), output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(("weights", "measure"), [("loss", "nats"), ("norm", "relative error")])
def test_budget_is_spent_on_nats_where_the_loss_weighs_the_tokens(run_config, tmp_path, weights, measure):
    results = []
    for workers in (1, 2):
        folder = tmp_path / f"run{workers}"
        changes = {"calibration__token_weights": weights, "execution__workers": workers, "output__dir": str(folder)}
        summary = pipeline.quantize(run_config(**{**MODES["budget"], **changes}))
        results.append(files_of(model_of(summary)))
    assert results[0] == results[1]
    assert summary.widths_by == measure
    read_again = read_summary(folder / "summary.json")
    assert read_again == summary
    assert not [note for note in summary.notes if "may choose" in note]
    blocks = RunDirectory(folder, "").blocks()
    last = [layer for (number, _), block in blocks.items() if number == 1 for layer in block.layers]
    page, card = write_report(Findings.read(folder)).read_text(), (model_of(summary) / "README.md").read_text()
    for shown in (
        "KL divergence predicted from layer errors" in page,
        "Layers that are predicted to cost most" in page,
        "it predicts the KL divergence" in card,
    ):
        assert shown == (weights == "loss")
    assert ("the nats that each layer" if weights == "loss" else "relative layer errors") in page
    if weights == "norm":
        assert summary.predicted_divergence is None
        return
    assert summary.predicted_divergence == pytest.approx(sum(layer.predicted_nats for layer in last))
    # Errors are less on the few tokens that the layers were fitted to.
    assert 0.05 < summary.predicted_divergence / summary.perplexity.divergence < 2
    expected = naive_gradient_energies(tmp_path, [layer.members for layer in last])
    for layer in last:
        assert layer.gradient_energy == pytest.approx(expected[layer.members[0]], rel=1e-3)


def naive_gradient_energies(tmp_path, input_groups):
    """Squared means of the norms of gradients at the outputs of layers, by the whole model's backward in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float64)
    outputs, tokens = {}, load_file(tmp_path / "run1" / "tokens.safetensors")
    ids = torch.cat([tokens[name] for name in sorted(tokens) if name.startswith("c")])
    for name in (name for names in input_groups for name in names):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: outputs.update({name: out}) or out.retain_grad()
        )
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    stacked = {names[0]: torch.cat([outputs[name].grad for name in names], dim=-1) for names in input_groups}
    return {name: float(gradient.square().mean(-1).sqrt().mean()) ** 2 for name, gradient in stacked.items()}


def test_overrides_of_other_widths_are_written_noted_and_load(run_config):
    overrides = {"*.down_proj": {"bits": 8}, "*.q_proj": {"bits": 3}}
    summary = pipeline.quantize(run_config(quantization__overrides=overrides))
    groups = config_of(model_of(summary))["config_groups"].values()
    assert sorted((g["weights"]["num_bits"], len(g["targets"])) for g in groups) == [(3, 3), (4, 15), (8, 3)]
    assert any("q_proj" in note and "vLLM fuses them" in note for note in summary.notes)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(model_of(summary), output_loading_info=True)
    assert not any(info.values())


def test_override_that_matches_nothing_is_refused(run_config):
    for pattern in ("*.w1", "*.mlp"):
        with pytest.raises(ConfigError, match=r"quantization.overrides: '\*.\w+' matches no linear layer"):
            prepare(run_config(quantization__overrides={pattern: {"bits": 8}}))


def test_budget_that_overrides_exceed_is_refused_before_anything_starts(run_config, tmp_path):
    config = run_config(**{**MODES["budget"], "quantization__overrides": {"*.mlp.*": {"bits": 8}}})
    with pytest.raises(ConfigError, match="average_bits: 3.5 is less than the smallest widths"):
        pipeline.quantize(config)
    assert not (tmp_path / "run").exists()


def test_rerun_of_finished_rounds_notes_no_damage_and_leaves_nothing_behind(run_config, tmp_path):
    first = pipeline.quantize(run_config(**MODES["rounds"]))
    (tmp_path / "run" / "activations").mkdir()
    assert pipeline.quantize(run_config(**MODES["rounds"])) == first
    assert "damaged" not in (tmp_path / "run" / "journal.jsonl").read_text()
    assert not (tmp_path / "run" / "activations").exists()
    assert not (tmp_path / "run" / "rounds").exists()


def test_error_in_a_tile_is_a_failed_run_that_keeps_what_is_finished(run_config, tmp_path, monkeypatch):
    real = SplitSolver.solve_rows

    def failing(self, call):
        if call.block == 1:
            raise RunError("disk gone")
        real(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(SplitSolver, "solve_rows", failing)
        with pytest.raises(RunError, match="disk gone"):
            pipeline.quantize(run_config(**MODES["sequential"]))
    assert (tmp_path / "run" / "records" / "round-0-block-0000.json").is_file()
    assert pipeline.quantize(run_config(**MODES["sequential"])).resumed_units >= 2


def before_once(monkeypatch, is_meant, harm):
    """Do something to a worker, or to a file, before the first call that is meant."""
    real, harmed = Worker.do, []

    def do(self, call):
        if not harmed and is_meant(call):
            harmed.append(call)
            harm(self)
        return real(self, call)

    monkeypatch.setattr(Worker, "do", do)


@pytest.mark.parametrize(
    ("mode", "block", "part", "reader"),
    [
        ("sequential", 1, "0-share-0", MergeHessians),
        ("sequential", 1, "1-sum", SolveRows),
        ("sequential", 1, "0-sum", TryBetas),
        ("sequential", 1, "2-sample-0", SolveRows),
        ("sequential", 1, "2-sample-0", WriteBlock),
        ("sequential", 1, "2-decision", WriteBlock),
        ("sequential", 1, "2-tile-0", WriteBlock),
        ("blocks", 0, "1-sum", MergeHessians),
        ("blocks", 0, "1-sample-0", SolveRows),
        ("blocks", 0, "0-decision", WriteBlock),
        ("blocks", 0, "2-tile-0", WriteBlock),
    ],
)
def test_part_of_a_solve_that_was_damaged_is_made_again(run_config, tmp_path, monkeypatch, mode, block, part, reader):
    expected = whole(run_config, tmp_path, mode)
    path = RunDirectory(tmp_path / "run", "").partial(0, block, part)

    def harm(worker):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        if reader is WriteBlock and "tile" not in part:  # nothing but its note is read
            content = path.read_bytes().replace(rb"\"seconds\"", rb"\"Seconds\"")
            assert content != path.read_bytes()
        path.write_bytes(content)
        worker._solver._block = None  # as another worker, which must read it

    before_once(monkeypatch, lambda call: isinstance(call, reader) and path.exists(), harm)
    summary = pipeline.quantize(run_config(execution__workers=5, **MODES[mode]))
    assert files_of(model_of(summary)) == expected
    assert [retry.kind for retry in summary.retries] == ["damaged"]
    assert not list((tmp_path / "run").glob("activations"))


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("original/0001/c0000", Backward),
        ("original/0003/c0001", DifferentiateLoss),
        ("gradient/0003/c0000", Backward),
        ("gradient/0001/c0001", Backward),
        ("energy/0002/c0001", WeighTokens),
        ("energy/0001/c0000", WeighTokens),
        ("token-weights/0001", OpenBlock),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_file_of_the_waves_that_was_damaged_is_made_again(run_config, tmp_path, monkeypatch, file, reader, workers):
    expected = whole(run_config, tmp_path, "loss")
    path = tmp_path / "run" / "activations" / f"{file}.safetensors"

    def harm(_):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    before_once(monkeypatch, lambda call: isinstance(call, reader) and path.exists(), harm)
    summary = pipeline.quantize(run_config(execution__workers=workers, **MODES["loss"]))
    assert files_of(model_of(summary)) == expected
    assert [retry.kind for retry in summary.retries] == ["damaged"]


@pytest.mark.parametrize(
    ("mode", "workers", "file", "reader"),
    [
        ("tuned", 1, "original/0001/c0000", SolveBlock),
        ("tuned", 5, "embedded/0000/c0000", WriteBlock),
        ("tuned, sequential", 2, "round-0/0001/c0000", WriteBlock),
        ("tuned, sequential", 1, "token-weights/0001", WriteBlock),
        ("tuned", 1, "calls-1x48", SolveBlock),
    ],
)
def test_file_that_tuning_reads_and_that_was_damaged_is_made_again(
    run_config, tmp_path, monkeypatch, mode, workers, file, reader
):
    changes = {**MODES[mode], **(LOSS if "weights" in file else {})}
    expected = files_of(model_of(pipeline.quantize(run_config(**changes, output__dir=str(tmp_path / "sound")))))
    path = tmp_path / "run" / "activations" / f"{file}.safetensors"
    block = 1 if "0001" in file else 0

    def harm(worker):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        worker._runner.calls.clear()

    before_once(monkeypatch, lambda call: isinstance(call, reader) and call.block == block, harm)
    summary = pipeline.quantize(run_config(execution__workers=workers, **changes))
    assert files_of(model_of(summary)) == expected
    assert [retry.kind for retry in summary.retries] == ["damaged"]


def test_block_without_gradient_is_said_and_its_tokens_are_weighted_by_their_norm(run_config, tmp_path, monkeypatch):
    real = token_weigher.pass_back

    def failing(layers, action, hidden, gradient):
        if any(".1." in operand.names[0] for operand in layers.operands):
            raise UnsupportedError("no gradient passes through this block: derivative for x is not implemented")
        return real(layers, action, hidden, gradient)

    monkeypatch.setattr(token_weigher, "pass_back", failing)
    summary = pipeline.quantize(run_config(**MODES["loss"]))
    assert any("in 2 blocks tokens are weighted by their norm" in note for note in summary.notes)
    kinds = {
        place[1]: {layer.token_weights for layer in block.layers}
        for place, block in RunDirectory(tmp_path / "run", "").blocks().items()
    }
    assert kinds == {0: {"norm"}, 1: {"norm"}, 2: {"loss"}}


@pytest.mark.parametrize("read", [2, 3, 6])
def test_sample_that_is_damaged_when_some_have_chosen_from_it(run_config, tmp_path, monkeypatch, read):
    """Those weigh it once more, and all come to one strength of the regularization."""
    monkeypatch.setattr("astro.linalg.tiling.row_tile", lambda *_: 40)
    changes = {**SEQUENTIAL, "quantization__scale_search": "minmax", "quantization__refine_passes": 0}
    whole = pipeline.quantize(run_config(execution__workers=4, output__dir=str(tmp_path / "whole"), **changes))
    real, reads = SplitSolver._sample_errors, []

    def sample_errors(self, block, batch, tile):
        reads.append(batch)
        if len(reads) == read:
            path = block._path(batch, "sample-0")
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        return real(self, block, batch, tile)

    monkeypatch.setattr(SplitSolver, "_sample_errors", sample_errors)
    summary = pipeline.quantize(run_config(execution__workers=4, **changes))
    assert {retry.kind for retry in summary.retries} == {"damaged"}
    assert files_of(model_of(summary)) == files_of(model_of(whole))
