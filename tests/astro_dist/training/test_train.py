"""Trainings in this process: loss falls, they go on bit by bit, the result loads, wrong input is refused."""

import functools
import json
import platform
import shutil
import signal
import sys
import time

import pytest
import torch
import transformers
from safetensors import safe_open

from astro.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    NumericalError,
    RunError,
    StorageError,
    UnsupportedError,
)
from astro.linalg import compiled
from astro.model.clips_file import CLIPS_FILE
from astro_dist import cli
from astro_dist.config.training import OptimizationConfig
from astro_dist.execution.termination import Terminated
from astro_dist.run_directory.identity import read_identity
from astro_dist.run_directory.journal import Journal
from astro_dist.source import long_wait
from astro_dist.training import loop
from astro_dist.training.parallel import ParallelModel, Place
from astro_dist.training.progress import EventReader
from astro_dist.training.token_file import TokenFile, write_tokens
from astro_dist.training.train import train
from astro_dist.training.training_directory import TrainingDirectory
from astro_dist.worker import device_check
from tests.support.models import byte_tokenizer


def weights(config):
    with safe_open(config.output.dir / "model" / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_writes_a_model_that_transformers_loads(settings, events):
    config = settings(optimization__steps=20, text__sequence_length=64)
    summary = train(config)
    losses = [event["loss"] for event in events(config)]
    assert losses[0] > 5
    assert summary.loss == losses[-1] < 4
    assert summary.tokens == 20 * 4 * 64
    model, info = transformers.AutoModelForCausalLM.from_pretrained(summary.model, output_loading_info=True)
    assert not any(info.values())
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert transformers.AutoTokenizer.from_pretrained(summary.model)("a")["input_ids"]
    with safe_open(summary.clips, "pt") as file:
        assert len(file.keys()) == 2 * 7
        assert file.metadata()["bits"] == "4"
        clips = file.get_tensor("model.layers.1.mlp.down_proj.input_clips")
    assert clips.shape == (2,)
    assert clips[0] < 0 < clips[1]
    assert clips.tolist() != [-4, 4]


@pytest.mark.parametrize(
    ("bits", "kurtosis", "has_clips"), [(None, 0.0, False), (4, 0.0, True), (None, 1e-3, False), (4, 1e-3, True)]
)
def test_all_four_ways_of_training(settings, bits, kurtosis, has_clips):
    config = settings(regularization__input_bits=bits, regularization__kurtosis=kurtosis)
    summary = train(config)
    assert (summary.penalty > 0) == (kurtosis > 0)
    assert (config.output.dir / "model" / CLIPS_FILE).exists() == has_clips == (summary.clips is not None)
    assert len({path.stat().st_mode for path in (config.output.dir / "model").iterdir()}) == 1, "others may read all"


def test_regularization_changes_what_is_learned(settings):
    results = []
    for number, (bits, kurtosis) in enumerate([(None, 0.0), (4, 0.0), (None, 1e-2)]):
        config = settings(f"t{number}", regularization__input_bits=bits, regularization__kurtosis=kurtosis)
        train(config)
        results.append(weights(config))
    assert not same(results[0], results[1])
    assert not same(results[0], results[2])


def test_micro_batches_change_nothing_but_last_bits(settings):
    one, other = settings("one", optimization__micro_batch_sequences=4), settings("other")
    assert train(one).loss == pytest.approx(train(other).loss, rel=1e-4)


def test_stopped_training_goes_on_as_if_it_had_not_stopped(settings, events, monkeypatch):
    whole, cut = settings("whole"), settings("cut")
    train(whole)
    step = loop.Trainer._do_step

    def stop_in_the_fourth(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Trainer, "_do_step", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    train(cut)
    assert [event["step"] for event in events(cut, "begun")] == [0, 2]
    assert [event["step"] for event in events(cut)] == [1, 2, 3, 3, 4, 5, 6]
    assert same(weights(whole), weights(cut))
    with (
        safe_open(cut.output.dir / "model" / CLIPS_FILE, "pt") as a,
        safe_open(whole.output.dir / "model" / CLIPS_FILE, "pt") as b,
    ):
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("compile_wish", [True, "auto"])
def test_compiled_training_learns_the_same(settings, events, compile_wish):
    plain, other = settings("plain"), settings("compiled", execution__compile=compile_wish)
    assert train(other).loss == pytest.approx(train(plain).loss, rel=1e-3)
    assert not events(plain, "begun")[0]["is_compiled"]
    assert not events(plain, "compiling")
    assert events(other, "begun")[0]["is_compiled"]
    assert not events(other, "not_compiled")
    assert not compiled.is_enabled()


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(loop, "rehearse", fail)


def test_machine_that_cannot_compile_trains_and_says_so_unless_it_was_told_to(settings, events, no_compiler, caplog):
    auto = settings("auto", execution__compile="auto")
    with caplog.at_level("INFO", "astro_dist"):
        train(auto)
    assert "regularized (not compiled), " in caplog.text
    (event,) = events(auto, "not_compiled")
    assert event["reason"].startswith(f"{platform.node()}: the regularization cannot be compiled: Failed to find C")
    assert "Mend that on every node" in event["reason"]
    assert f"the regularization runs without a compiler, which is slower: {event['reason']}" in caplog.text
    with pytest.raises(RunError, match=r"cannot be compiled: .* or set execution\.compile: auto"):
        train(settings("true", execution__compile=True))
    plain = settings("off", execution__compile=True, regularization__input_bits=None, regularization__kurtosis=0.0)
    train(plain)  # nothing is to be compiled
    assert not events(plain, "compiling")


class OneOfTwo(Place):
    """A worker beside one that cannot compile."""

    def all_gather(self, value):
        return [value, "node-2: no compiler"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_wish", [True, "auto"])
def test_all_workers_compile_or_none_does(settings, compile_wish):
    config = settings(execution__compile=compile_wish)
    train(settings(optimization__steps=1, optimization__warmup_steps=0))  # for its tokens
    tokens = TokenFile(config.output.dir / "tokens.bin", 32 * 50, 32)
    said = []
    trainer = loop.Trainer(config, tokens, OneOfTwo(0, 1, torch.device("cpu")))
    outlet = loop.Outlet(lambda kind, event: said.append((kind, event)), lambda step, write: None)
    if compile_wish is True:
        with pytest.raises(RunError, match="node-2: no compiler"):
            trainer.run(outlet)
        return
    trainer.run(outlet)
    assert said[1] == ("not_compiled", {"reason": "node-2: no compiler"})
    assert not said[2][1]["is_compiled"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_stopped_training_leaves_a_checkpoint_behind_its_step(settings, events, monkeypatch, caplog, request, stop):
    whole, cut = (settings(name, optimization__steps=40, output__checkpoint_every=1000) for name in ("whole", "cut"))
    train(whole)
    step = loop.Trainer._do_step

    def stop_in_the_third(self):
        if self.step == 2:  # the main thread waits in a call that the signal interrupts
            signal.raise_signal(signal.SIGINT if stop is KeyboardInterrupt else signal.SIGTERM)
        time.sleep(0.1)
        return step(self)

    def terminate(*_):
        raise Terminated

    monkeypatch.setattr(loop.Trainer, "_do_step", stop_in_the_third)
    if stop is Terminated:
        request.addfinalizer(functools.partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, terminate)))
    with caplog.at_level("INFO", "astro_dist"), pytest.raises(stop):
        train(cut)
    (kept,) = events(cut, "checkpoint")
    assert 3 <= kept["step"] < 40
    assert kept["step"] == events(cut)[-1]["step"]
    assert ("; press Ctrl-C again" in caplog.text) == (stop is KeyboardInterrupt)
    assert f"the last checkpoint is behind step {kept['step']}" in caplog.text
    monkeypatch.undo()
    train(cut)
    assert events(cut, "begun")[-1]["step"] == kept["step"]
    assert same(weights(whole), weights(cut))


def test_training_that_is_stopped_before_any_step_says_that_there_is_no_checkpoint(settings, monkeypatch, caplog):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "run", stop)
    with caplog.at_level("INFO", "astro_dist"), pytest.raises(KeyboardInterrupt):
        train(settings())
    assert "no step was done" in caplog.text


def test_interruption_in_the_last_step_ends_a_training_that_is_done(settings, monkeypatch):
    def interrupt(self):
        figures = step(self)
        if self.is_done:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)  # until the main thread has told the loop to end
        return figures

    step = loop.Trainer._do_step
    monkeypatch.setattr(loop.Trainer, "_do_step", interrupt)
    assert train(settings()).steps == 6


def test_failure_at_the_stop_is_said(settings, monkeypatch, caplog):
    def fail(*_):
        raise StorageError("the disk is full")

    def interrupt(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)
        return step(self)

    step = loop.Trainer._do_step
    monkeypatch.setattr(loop.Trainer, "_do_step", interrupt)
    monkeypatch.setattr(loop, "save_checkpoint", fail)
    with caplog.at_level("INFO", "astro_dist"), pytest.raises(KeyboardInterrupt):
        train(settings())
    assert "the training did not end in order: the disk is full" in caplog.text
    assert "there is no checkpoint yet" in caplog.text


def test_gradient_that_is_not_finite_leaves_no_checkpoint(settings, events, monkeypatch):
    clip = ParallelModel.clip_gradient

    def spoil(self, norm):
        next(self.model.parameters()).grad[0, 0] = torch.nan
        return clip(self, norm)

    monkeypatch.setattr(ParallelModel, "clip_gradient", spoil)
    config = settings(output__checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"step 1: the loss is \d.*, and the gradient's norm is nan; begin anew in"):
        train(config)
    assert not (config.output.dir / "checkpoints").exists()


def test_another_executor_or_precision_does_not_begin_anew_in_silence(settings):
    config = settings(output__checkpoint_every=2)
    train(config)
    (config.output.dir / "training.json").unlink()
    other = settings(optimization__precision="auto", execution__executor="ray")
    with pytest.raises(ConfigError, match=r"checkpoints: holds checkpoints of execution\.executor: local; set it back"):
        TrainingDirectory(other.output.dir).require_executor("ray")
    trainer = loop.Trainer(
        settings(optimization__precision="bfloat16"), TokenFile(config.output.dir / "tokens.bin", 3200, 32),
        Place(0, 1, torch.device("cpu")),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="was trained in float32, and optimization.precision: bfloat16 is bfloat16"):
        trainer.load(config.output.dir / "checkpoints" / "step-000000004")
    shutil.rmtree(config.output.dir / "checkpoints")
    (config.output.dir / "checkpoints" / "checkpoint_2026").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds checkpoints of execution\.executor: ray; set it back"):
        train(config)


def test_finished_training_of_an_earlier_version_is_read(settings):
    config = settings()
    now = train(config)
    path = config.output.dir / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commands": [], "of_a_later_version": 1}))
    assert train(config) == now


def test_training_of_a_version_that_minimized_something_else_is_not_gone_on_with(settings):
    old, finished, plain = (
        settings(name, regularization__kurtosis=kurtosis) for name, kurtosis in [("a", 1e-3), ("b", 1e-3), ("c", 0.0)]
    )
    for config in (old, finished, plain):
        train(config)
        (config.output.dir / "objective.json").unlink()  # as before 0.12.0
    for config in (old, plain):
        (config.output.dir / "training.json").unlink()
    with pytest.raises(ConfigError, match=r"begun by another version, in which the same regularization\.kurtosis may"):
        train(old)
    train(plain)
    train(finished)


def test_event_that_a_killed_worker_cut_short_is_passed_over(tmp_path):
    journal = Journal(tmp_path / "progress.jsonl")
    reader = EventReader(journal.path)
    journal.note("begun", step=0)
    with journal.path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["event"] for event in reader.new_events()] == ["begun"]
    journal.note("begun", step=2)
    assert [event["step"] for event in reader.new_events()] == [2]


def test_finished_training_is_not_done_again(settings, events):
    config = settings()
    assert train(config) == train(config)
    assert len(events(config, "begun")) == 1


def test_first_try_that_was_refused_does_not_bind_the_next(settings, tmp_path, caplog):
    text = tmp_path / "text.txt"
    text.write_text("ab")
    with pytest.raises(ConfigError, match="expected at least one sequence"):
        train(settings(text__source=str(text)))
    with pytest.raises(ConfigError, match="expected at least one sequence"):
        train(settings(text__source=str(text)))  # once more: what it left behind is not taken for tokens
    text.write_text("more text " * 100)
    train(settings(text__source=str(text), optimization__warmup_steps=6))
    assert "warmup_steps: 6 is not below steps: 6, so the learning rate rises to the end" in caplog.text


def test_command_of_runs_says_that_a_folder_holds_a_training(settings):
    config = settings()
    train(config)
    with pytest.raises(ConfigError, match="training: holds a training, and this command takes runs of quantize"):
        read_identity(config.output.dir)


def test_other_settings_in_the_same_folder_are_refused(settings):
    train(settings())
    with pytest.raises(ConfigError, match=r"its training has optimization.seed: 0, got 1; set it back"):
        train(settings(optimization__seed=1))
    train(settings(output__report_every=3))


def test_training_goes_on_from_weights(settings, events, tmp_path):
    first = train(settings("first", optimization__steps=20))
    again = settings("again", model__source=first.model, model__start="weights", optimization__warmup_steps=0)
    train(again)
    assert events(again)[0]["loss"] < 5


def test_only_checkpoints_that_are_wanted_are_kept(settings):
    config = settings(output__keep_checkpoints=1, output__checkpoint_every=1)
    train(config)
    assert [path.name for path in (config.output.dir / "checkpoints").iterdir()] == ["step-000000005"]


def test_loss_that_is_not_finite_ends_the_training(settings):
    with pytest.raises(NumericalError, match=r"step \d: the loss is .*with a lower optimization.learning_rate"):
        train(settings(optimization__learning_rate=1e30, regularization__input_bits=None))
    with pytest.raises(NumericalError, match=r"_proj: its learned clips are .*, expected the first below the second"):
        train(settings("clips", optimization__learning_rate=1e3, optimization__warmup_steps=0))


def test_learning_rate_rises_and_falls():
    optimization = OptimizationConfig(steps=110, warmup_steps=10, learning_rate=1.0, final_share=0.1)
    rates = [loop.learning_rate(optimization, step) for step in range(111)]
    assert rates[:3] == [0.1, 0.2, 0.3]
    assert rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)


def test_every_sequence_comes_once_in_a_pass(settings):
    config = settings()
    train(config)
    tokens = TokenFile(config.output.dir / "tokens.bin", 32 * 50 + 7, 32)
    first = tokens.sequences(0, 50, seed=0)
    second = tokens.sequences(50, 50, seed=0)
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert torch.equal(tokens.sequences(20, 3, seed=0), first[20:23])


def test_a_long_text_says_how_much_of_it_is_tokenized(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(long_wait, "_EVERY_S", 0.0)
    caplog.set_level("INFO", "astro_dist")
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": "word " * 20_000}) + "\n" for _ in range(3)))
    write_tokens(settings(text__source=str(text)).text, byte_tokenizer(), 1000, tmp_path / "tokens.bin")
    assert caplog.messages == [f"text.source {text}: tokenized 0.{done} million characters" for done in (1, 2, 3)]


def test_documents_are_parted_by_the_end_of_text(settings, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["ab", "", "c"] * 20))
    config = settings(text__source=str(tmp_path / "texts.jsonl"))
    train(config)
    content = (config.output.dir / "tokens.bin").read_bytes()
    ids = byte_tokenizer()("abc", add_special_tokens=False)["input_ids"]
    assert list(memoryview(content).cast("I"))[:6] == [*ids[:2], 257, ids[2], 257, ids[0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text__source": "nothing.txt"}, ConfigError, "text.source nothing.txt: there is no such file in /"),
        ({"model__source": "/nothing"}, CheckpointError, "model.source /nothing: its tokenizer cannot be loaded"),
        ({"model__overrides": {"layers": 3}}, ConfigError, "model.overrides.layers: LlamaConfig has no such key"),
        ({"model__start": "weights"}, UnsupportedError, "no causal language model can be made of it"),
        ({"regularization__layers": ["*.nothing"]}, ConfigError, r"'\*.nothing' matches no linear layer"),
        ({"text__sequence_length": 10**7}, ConfigError, "expected at least one sequence of 10000000"),
    ],
)
def test_wrong_input_is_refused(settings, changes, error, message):
    with pytest.raises(error, match=message):
        train(settings(**changes))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpu_that_cannot_be_used_is_not_passed_over(settings, monkeypatch, device):
    monkeypatch.setattr(device_check, "has_gpu", lambda: True)
    monkeypatch.setattr(device_check, "gpu_trouble", lambda key: f"its driver is too old; set {key} cpu")
    with pytest.raises(ConfigError, match=f"^execution.device: {device}: .*GPU.*, but its driver is too old"):
        train(settings(execution__device=device))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution__workers": 3, "execution__executor": "ray"}, "batch_sequences: 4 is no multiple of 6"),
        ({"execution__workers": 2}, "executor: local is one worker"),
        ({"model__start": "weights", "model__overrides": {"num_hidden_layers": 1}}, "overrides: only with start"),
        ({"optimization__betas": [0.9, 1.0]}, "betas: expected two numbers"),
        ({"model__source": "s3://bucket/model"}, "source: expected a folder or ORG/NAME"),
    ],
)
def test_settings_say_what_is_wrong(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_command_trains_and_its_output_is_one_json_object(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.yaml"
    path.write_text(settings().to_yaml())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["astro-dist", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    code, _, err = run(path, "--set", "optimization.step=3")
    assert code == 2
    assert "unknown key optimization.step (did you mean steps?)" in err
    code, out, err = run(path, "--set", "optimization.steps=3")
    assert code == 0
    assert "step 3 of 3: loss" in err
    assert "astro-dist inspect" in out
    code, out, _ = run(path, "--set", "optimization.steps=3", "--json")
    assert json.loads(out)["steps"] == 3
