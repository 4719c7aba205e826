"""Whole runs on a tiny checkpoint, in this process."""

import errno
import fcntl
import json
import math
import re
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from astro.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    NumericalError,
    RunError,
    StorageError,
    UnsupportedError,
)
from astro.linalg import compiled
from astro.storage.checkpoint import INDEX_NAME, Checkpoint
from astro_dist import pipeline
from astro_dist.execution import driver, failure, patience
from astro_dist.execution.executor import Failed, Returned
from astro_dist.execution.local_executor import LocalExecutor
from astro_dist.export.verify import verify_model
from astro_dist.planning.validate import prepare
from astro_dist.report.status import read_status
from astro_dist.run_directory import beginning
from astro_dist.run_directory.summary import Perplexity
from astro_dist.worker import compile_check
from astro_dist.worker.worker import Worker
from tests.support.models import LLAMA, files_of, write_checkpoint


def model_of(summary):
    from pathlib import Path

    return Path(summary.model)


@torch.no_grad()
def perplexity(model, tokens):
    losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in tokens]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.parametrize("quantization", [{}, {"bits": 8}, {"bits": 3}, {"group_size": -1}])
def test_transformers_loads_what_was_written_and_agrees(run_config, llama, tmp_path, quantization):
    config = run_config(**{f"quantization__{key}": value for key, value in quantization.items()})
    summary = pipeline.quantize(config)
    folder = model_of(summary)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = load_file(tmp_path / "run" / "tokens.safetensors")["h0000"]
    assert perplexity(model, tokens) == pytest.approx(summary.perplexity.quantized, rel=1e-5)
    original = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert perplexity(original, tokens) == pytest.approx(summary.perplexity.original, rel=1e-5)


def test_result_is_a_whole_checkpoint(run_config, llama, tmp_path):
    folder = model_of(pipeline.quantize(run_config()))
    checkpoint = Checkpoint.open(folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(entry.size_bytes for entry in checkpoint.entries.values())
    source = Checkpoint.open(llama)
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(checkpoint.read([key])[key], source.read([key])[key])
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files_of(folder))
    content = json.loads((folder / "config.json").read_text())
    assert content["quantization_config"]["ignore"] == ["lm_head"]
    assert not (tmp_path / "run" / "activations").exists()


def test_plan_tells_the_bytes_that_are_written(run_config):
    prepared = prepare(run_config())
    folder = model_of(pipeline.quantize(run_config()))
    written = sum(entry.size_bytes for entry in Checkpoint.open(folder).entries.values())
    assert prepared.plan.written_bytes == written


def test_number_of_workers_does_not_change_a_byte(run_config, tmp_path):
    results = []
    for workers in (1, 2, 3):
        config = run_config(execution__workers=workers, output__dir=str(tmp_path / f"run{workers}"))
        results.append(files_of(model_of(pipeline.quantize(config))))
    assert results[0] == results[1] == results[2]


def test_asymmetric_and_rounded_runs_end_with_a_sound_model(run_config, tmp_path):
    for name, changes in {"a": {"quantization__symmetric": False}, "r": {"quantization__method": "rtn"}}.items():
        summary = pipeline.quantize(run_config(output__dir=str(tmp_path / name), **changes))
        assert summary.perplexity.quantized == pytest.approx(summary.perplexity.original, rel=0.05)
        verify_model(model_of(summary))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compute_dtype_is_recorded(run_config, tmp_path, dtype):
    pipeline.quantize(run_config(execution__compute_dtype=dtype))
    record = json.loads((tmp_path / "run" / "records" / "embed.json").read_text())
    assert record["result"]["compute_dtype"] == f"torch.{dtype}"


def test_ignored_layers_are_copied_and_listed(run_config, llama):
    folder = model_of(pipeline.quantize(run_config(quantization__ignore=["*.down_proj"])))
    checkpoint = Checkpoint.open(folder)
    key = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read([key])[key], Checkpoint.open(llama).read([key])[key])
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == [*(f"model.layers.{i}.mlp.down_proj" for i in range(3)), "lm_head"]
    transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("times", "noted"), [(1.9, 0), (2.1, 1)])
def test_result_that_is_ruined_is_spoken_of(run_config, monkeypatch, times, noted):
    ruined = Perplexity(original=10.0, quantized=times * 10.0)
    monkeypatch.setattr(Perplexity, "of", lambda original, result: ruined)
    notes = pipeline.quantize(run_config()).notes
    assert len([note for note in notes if f"the hold-out perplexity is {times} times the original's" in note]) == noted


def test_run_without_held_out_text_has_no_perplexity(run_config):
    summary = pipeline.quantize(run_config(calibration__holdout_samples=0))
    assert summary.perplexity == Perplexity(original=None, quantized=None)


class _Interrupted(BaseException):
    pass


def test_finished_run_is_only_summarized_again(run_config):
    first, second = pipeline.quantize(run_config()), pipeline.quantize(run_config())
    assert first == second


@pytest.mark.parametrize("written", [0, 1, 2])
def test_run_that_died_while_it_began_begins_again(run_config, tmp_path, monkeypatch, written):

    def dying(write):
        def call(path, *rest):
            if len({*(tmp_path / "run").glob("[a-z]*.*")} - {tmp_path / "run" / "journal.jsonl"}) == written:
                path.with_name(f".{path.name}.x.part").write_text("half")
                raise _Interrupted
            return write(path, *rest)

        return call

    with monkeypatch.context() as patch:
        for name in ("write_text", "write_json", "save_part"):
            patch.setattr(beginning, name, dying(getattr(beginning, name)))
        with pytest.raises(_Interrupted):
            pipeline.quantize(run_config())
    pipeline.quantize(run_config())
    assert not list((tmp_path / "run").rglob("*.part"))


def test_second_driver_on_a_run_is_refused(run_config, tmp_path):
    pipeline.quantize(run_config())
    (tmp_path / "run" / "records" / "round-0-block-0002.json").unlink()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is at work on this run"):
            pipeline.quantize(run_config())


def test_waiting_for_workers_is_told_and_ends(run_config, monkeypatch, capsys):
    monkeypatch.setattr(LocalExecutor, "idle", lambda self: [])
    monkeypatch.setattr(patience, "_USUAL_START_S", 0.05)
    monkeypatch.setattr(driver, "_TICK_S", 0.01)
    with pytest.raises(RunError, match=r"no worker was up for 1 s \(execution.worker_timeout_s\); the cluster is down"):
        pipeline.quantize(run_config(execution__worker_timeout_s=1))
    said = capsys.readouterr().err
    assert re.search(r"no worker is up any more after [01] s, longer than a start usually takes", said)
    assert re.search(r"\(see `ray status`\); the run gives up in [01] s", said)


def test_changed_source_is_another_run(run_config, llama):
    pipeline.quantize(run_config())
    content = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-2}))
    with pytest.raises(ConfigError, match="holds another run .*SHA-256 of the source model's files"):
        pipeline.quantize(run_config())


def test_tensors_the_model_does_not_have_are_copied_and_said(run_config, llama):
    content = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 2}))
    summary = pipeline.quantize(run_config())
    assert any("9 tensors that LlamaForCausalLM does not have" in note for note in summary.notes)
    assert "model.layers.2.mlp.up_proj.weight" in Checkpoint.open(model_of(summary)).entries


def test_weights_are_quantized_as_they_are_stored_not_as_they_are_computed_with(run_config, llama, monkeypatch):
    from astro_dist.worker import worker

    seen = {}
    real = worker.quantize_block
    monkeypatch.setattr(worker, "quantize_block", lambda weights, *rest: seen.update(weights) or real(weights, *rest))
    pipeline.quantize(run_config(execution__compute_dtype="bfloat16"))
    source = Checkpoint.open(llama)
    assert len(seen) == 21
    assert all(torch.equal(W, source.read([f"{name}.weight"])[f"{name}.weight"]) for name, W in seen.items())


def test_input_error_of_a_worker_is_a_failed_run(run_config, tmp_path, monkeypatch):
    def damaged(self, call):
        raise CheckpointError("shard gone")

    monkeypatch.setattr(Worker, "solve_block", damaged)
    with pytest.raises(
        RunError, match="block 1 of 3, solve block on worker 3: shard gone. Attempt 4 of 4 .*What is finished is kept"
    ):
        pipeline.quantize(run_config())


def test_damaged_shard_is_redone_and_noted(run_config, tmp_path, caplog):
    folder = model_of(pipeline.quantize(run_config()))
    expected = files_of(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[-2]
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    summary = pipeline.quantize(run_config())
    assert files_of(folder) == expected
    for mended in (summary.mended, read_status(tmp_path / "run").mended):
        assert [(event.unit, event.reason.partition(" ")[0]) for event in mended] == [
            ("round-0-block-0001", f"model/{shard.name}")
        ]
    assert f"damaged: block 2 of 3: model/{shard.name} is missing or differs" in caplog.text


def test_run_that_came_to_nothing_makes_room_for_another(run_config, tmp_path, monkeypatch):
    def no_gpu(config):
        raise ConfigError("execution.device: cuda, but there is none")

    with monkeypatch.context() as without:
        without.setattr(pipeline, "_make_executor", no_gpu)
        with pytest.raises(ConfigError, match="cuda"):
            pipeline.quantize(run_config(quantization__bits=8))
    assert (tmp_path / "run" / "run.json").is_file()
    summary = pipeline.quantize(run_config(quantization__bits=3))
    assert "bits: 3" in (tmp_path / "run" / "config.yaml").read_text()
    assert summary.resumed_units == 0


def test_output_folder_that_holds_another_run_is_refused(run_config, tmp_path):
    pipeline.quantize(run_config())
    before = files_of(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match="holds another run .*quantization.bits: 4 there, 8 here"):
        pipeline.quantize(run_config(quantization__bits=8))
    assert files_of(tmp_path / "run" / "model") == before


def test_output_folder_that_is_no_run_is_refused(run_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not a run directory"):
        pipeline.quantize(run_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_going_on_in_another_dtype_is_refused(run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config())
    (tmp_path / "run" / "records" / "round-0-block-0002.json").unlink()
    monkeypatch.setattr(pipeline, "compute_dtype", lambda *args: torch.bfloat16)
    with pytest.raises(ConfigError, match=r"begun in torch.float32 .* set execution.compute_dtype: float32"):
        pipeline.quantize(run_config())


def test_raised_damping_is_reported(run_config, monkeypatch):
    from astro.quantization import prepared_groups

    real = prepared_groups.factorize

    def stubborn(H, order, damping, limit, names):
        # indefinite with the first damping, as a badly conditioned Hessian would be
        if damping < 0.05:
            H = H - 0.5 * H.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(H.shape[-1])
        factor = real(H, order, damping, limit, names)
        assert bool((factor.attempts > 1).all())
        return factor

    monkeypatch.setattr(prepared_groups, "factorize", stubborn)
    summary = pipeline.quantize(run_config())
    assert len(summary.fallbacks.damping_raised) == 12


def test_verify_accepts_the_result_and_measures_it(run_config, llama):
    folder = model_of(pipeline.quantize(run_config()))
    report = verify_model(folder, llama)
    assert report.num_linears == 21
    assert all(0 < error < 0.5 for error in report.relative_weight_errors.values())


def test_file_that_was_damaged_on_its_way_is_made_again_and_reported(run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole")))
    real, harm = Worker.forward, tmp_path / "run" / "activations" / "original" / "0001" / "c0000.safetensors"

    def damaging(self, call):
        if (call.block, call.chunk) == (1, "c0000") and not list(tmp_path.glob("harmed")):
            (tmp_path / "harmed").touch()
            content = bytearray(harm.read_bytes())
            content[-1] ^= 1
            harm.write_bytes(content)
        return real(self, call)

    monkeypatch.setattr(Worker, "forward", damaging)
    summary = pipeline.quantize(run_config(execution__workers=2))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")
    (retry,) = summary.retries
    assert retry.kind == "damaged"
    assert f"{harm}: its checksum is wrong" in retry.cause


def test_full_disk_that_is_freed_delays_the_run(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(failure, "_STORAGE_WAIT_S", 0.0)
    real, refusals = Worker.solve_block, iter([OSError(errno.ENOSPC, "No space left on device")] * 2)

    def solve(self, call):
        for refusal in refusals:
            raise StorageError(f"shard: cannot be written: {refusal}")
        return real(self, call)

    monkeypatch.setattr(Worker, "solve_block", solve)
    summary = pipeline.quantize(run_config())
    assert [retry.kind for retry in summary.retries] == ["storage", "storage"]


def test_error_that_comes_back_ends_the_run_with_its_unit_and_the_same_command_goes_on(run_config, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(self, call):
            raise RuntimeError("CUDA error")

        patch.setattr(Worker, "solve_block", fail)
        message = "block 1 of 3, solve block on worker 2: RuntimeError: CUDA error. Attempt 3 of 3 .*max_retries: 2"
        with pytest.raises(RunError, match=message):
            pipeline.quantize(run_config(execution__max_retries=2))
    assert len(pipeline.quantize(run_config()).retries) == 3


def test_numerical_error_is_not_tried_again(run_config, monkeypatch):
    def fail(self, call):
        raise NumericalError("a Hessian that cannot be factored")

    monkeypatch.setattr(Worker, "solve_block", fail)
    with pytest.raises(NumericalError, match="cannot be factored"):
        pipeline.quantize(run_config())


def test_tokens_that_were_damaged_are_written_again(run_config, tmp_path):
    expected = files_of(model_of(pipeline.quantize(run_config())))
    (tmp_path / "run" / "records" / "round-0-block-0002.json").unlink()
    (tmp_path / "run" / "tokens.safetensors").write_bytes(b"")
    assert files_of(model_of(pipeline.quantize(run_config()))) == expected


def test_node_that_is_not_fit_does_not_end_a_run_that_others_go_on_with(run_config, monkeypatch):
    real, events = LocalExecutor.wait, iter([None, Failed(99, RunError("does not see the run directory"), lost=False)])
    monkeypatch.setattr(LocalExecutor, "wait", lambda self, timeout: next(events, None) or real(self, timeout))
    summary = pipeline.quantize(run_config())
    assert [(retry.unit, retry.worker) for retry in summary.retries] == [("start", 99)]


def test_unit_whose_worker_died_after_its_record_is_not_done_again(run_config, monkeypatch):
    real, done = Worker.solve_block, []

    def solve(self, call):
        done.append(call.block)
        return real(self, call)

    run_of = LocalExecutor.wait

    def wait(self, timeout):
        event = run_of(self, timeout)
        lost = isinstance(event, Returned) and done == [0, 1] and not monkeypatched
        if lost:
            monkeypatched.append(True)
            self.discard(event.worker)
            return Failed(event.worker, RunError("the worker died"), lost=True)
        return event

    monkeypatched = []
    monkeypatch.setattr(Worker, "solve_block", solve)
    monkeypatch.setattr(LocalExecutor, "wait", wait)
    summary = pipeline.quantize(run_config())
    assert done == [0, 1, 2]
    assert [retry.kind for retry in summary.retries] == ["lost"]


def test_read_that_fails_on_one_worker_destroys_nothing(run_config, tmp_path, monkeypatch):
    real, refusals = Worker.open_block, iter([True])

    def open_block(self, call):
        if call.round_index == 1 and next(refusals, False):
            shard = sorted((tmp_path / "run" / "model").glob("*.safetensors"))[-1]
            raise DamagedError(shard, "cannot be read: [Errno 116] Stale file handle")
        return real(self, call)

    solved = []
    solve = Worker.solve_block
    monkeypatch.setattr(Worker, "open_block", open_block)
    monkeypatch.setattr(Worker, "solve_block", lambda self, call: solved.append(call.block) or solve(self, call))
    summary = pipeline.quantize(run_config())
    assert solved == [0, 1, 2]
    assert [retry.kind for retry in summary.retries] == ["raised"]


def test_shard_that_is_damaged_after_it_was_written_is_found_in_the_same_run(run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole")))
    real = Worker.solve_block

    def solve(self, call):
        result = real(self, call)
        shard = tmp_path / "run" / result.files[0].name
        if call.block == 1 and not (tmp_path / "harmed").exists():
            (tmp_path / "harmed").touch()
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        return result

    monkeypatch.setattr(Worker, "solve_block", solve)
    summary = pipeline.quantize(run_config())
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")
    assert [retry.kind for retry in summary.retries] == ["damaged"]


def test_gptq_layout_holds_the_weights_that_compressed_tensors_holds(run_config, tmp_path):
    write_checkpoint(tmp_path / "llama", transformers.LlamaConfig(**LLAMA), torch.float16)
    overrides = {"*.down_proj": {"bits": 8}}
    changes = {"quantization__overrides": overrides, "quantization__ignore": ["*.o_proj"], "execution__rounds": 2}
    found = {}
    for name in ("compressed-tensors", "gptq"):
        folder = tmp_path / name
        summary = pipeline.quantize(run_config(quantization__format=name, output__dir=str(folder), **changes))
        report = verify_model(folder / "model", tmp_path / "llama")
        found[name] = (report.num_linears, report.relative_weight_errors, summary.perplexity)
    assert found["gptq"] == found["compressed-tensors"]
    assert found["gptq"][0] == 3 * 6


def test_layer_that_the_gptq_layout_cannot_hold_is_refused_before_the_start(run_config, tmp_path):
    write_checkpoint(tmp_path / "llama", transformers.LlamaConfig(**{**LLAMA, "intermediate_size": 132}))
    overrides = {"*.down_proj": {"group_size": -1}}
    with pytest.raises(UnsupportedError, match=r"gate_proj: 132 x 64 weights of 4 bits do not fill whole words"):
        prepare(run_config(quantization__format="gptq", quantization__overrides=overrides))


def test_journal_with_a_line_that_was_cut_short_is_read(run_config, tmp_path):
    pipeline.quantize(run_config())
    (tmp_path / "run" / "summary.json").unlink()
    with (tmp_path / "run" / "journal.jsonl").open("a") as journal:
        journal.write('{"time": 1.0, "event": "fin')
    assert pipeline.quantize(run_config()).retries == ()


def test_damaged_record_is_redone(run_config, tmp_path):
    expected = files_of(model_of(pipeline.quantize(run_config())))
    record = tmp_path / "run" / "records" / "round-0-block-0001.json"
    record.write_text(record.read_text().replace('"bits": 4', '"bits": 3'))
    assert files_of(model_of(pipeline.quantize(run_config()))) == expected
    assert '"bits": 4' in record.read_text()


def test_going_on_on_another_kind_of_device_is_refused(run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config())
    (tmp_path / "run" / "records" / "round-0-block-0002.json").unlink()
    monkeypatch.setattr(
        LocalExecutor,
        "__init__",
        lambda self, *_: vars(self).update(num_workers=1, has_gpus=True, threads=1, _workers={}, _events=[]),
    )
    with pytest.raises(
        ConfigError, match="this run was begun on cpu and would go on on cuda; set execution.device: cpu"
    ):
        pipeline.quantize(run_config())


def test_call_that_takes_long_in_this_process_is_progress(run_config, monkeypatch):
    copy = Worker.copy_tensors
    monkeypatch.setattr(Worker, "copy_tensors", lambda self, call: time.sleep(0.5) or copy(self, call))
    monkeypatch.setattr("astro_dist.execution.patience._STUCK_S", 0.3)
    config = run_config()
    pipeline.quantize(config)
    assert "stuck" not in (config.output.dir / "journal.jsonl").read_text()


def test_worker_that_shall_compile_without_a_compiler_says_so(run_config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(compile_check, "_difference", compiled.fused(lambda A, B: A - 3 * B))  # one that is not there
    with pytest.raises(RunError, match=r"loops cannot be compiled: .* none of g\+\+, clang\+\+, c\+\+: install"):
        pipeline.quantize(run_config(execution__compile=True, execution__max_retries=0))


def test_a_mask_in_the_file_that_the_model_does_not_have_may_hold_inf(run_config, llama, tmp_path, caplog):
    index = json.loads((llama / INDEX_NAME).read_text())
    save_file({"model.layers.0.self_attn.bias": torch.full((4, 4), float("-inf"))}, llama / "more.safetensors")
    index["weight_map"]["model.layers.0.self_attn.bias"] = "more.safetensors"
    (llama / INDEX_NAME).write_text(json.dumps(index))
    pipeline.quantize(run_config())
    assert "tensor model.layers.0.self_attn.bias, which the model does not read, holds NaN or Inf" in caplog.text
    verify_model(tmp_path / "run" / "model")


def test_an_index_that_is_not_read_is_told(run_config, llama):
    source = transformers.AutoModelForCausalLM.from_pretrained(llama)
    source.save_pretrained(llama, max_shard_size="1GB")
    (llama / INDEX_NAME).write_text(json.dumps({"weight_map": {"stale": "gone.safetensors"}}))
    notes = prepare(run_config()).notes
    assert f"model.safetensors is read, as transformers does, and {INDEX_NAME} beside it is not" in notes
