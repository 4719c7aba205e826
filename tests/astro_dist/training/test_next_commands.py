"""The commands that a training names are taken as they are printed, and what would be refused is not named."""

import shlex
import sys

import pytest

from astro.errors import StorageError, UnsupportedError
from astro_dist import cli
from astro_dist.run_directory.summary import read_summary
from astro_dist.training import next_commands
from astro_dist.training.train import train


def run(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_commands_work_as_they_are_printed(settings, tmp_path, monkeypatch, capsys):
    summary = train(settings("my training"))
    inspect, quantize = (shlex.split(line) for line in summary.lines()[-2:])
    monkeypatch.chdir(tmp_path)
    assert run([*inspect, "--limit", "1"], monkeypatch) == 0
    small = ["calibration.samples=4", "calibration.holdout_samples=2", "execution.executor=local"]
    assert run([*quantize, *(word for key in small for word in ("--set", key))], monkeypatch) == 0
    result = read_summary(tmp_path / "runs" / "my-training-w4a4g32" / "summary.json")
    assert result.inputs == "int4 between learned clips"
    assert not summary.notes


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"regularization__layers": ["*.o_proj", "*.down_proj"]}, "clips of 4 layers, and of 10 quantized layers none"),
        ({"regularization__input_bits": 3}, "activations.bits: "),
    ],
)
def test_clips_that_would_be_refused_are_not_named(settings, changes, note):
    lines = train(settings(**changes)).lines()
    assert "from-checkpoint" not in lines[-1]
    assert lines[-1].startswith("  astro-dist quantize ")
    (said,) = [line for line in lines if line.startswith("note: ")]
    assert said.startswith("note: `quantize` does not take the learned clips: ")
    assert note in said
    assert said.endswith("; the model was trained for them and is much worse without")


@pytest.mark.parametrize("kind", [UnsupportedError, StorageError])
def test_model_that_quantize_refuses_is_only_inspected(settings, monkeypatch, kind):
    def refuse(config):
        raise kind("its blocks cannot be found")

    monkeypatch.setattr(next_commands, "prepare", refuse)
    lines = train(settings()).lines()
    assert [line.split()[1] for line in lines[lines.index("Next:") + 1 :]] == ["inspect"]
    notes = [line for line in lines if line.startswith("note: ")]
    assert notes == ["note: `quantize` does not take the model: its blocks cannot be found"]


def test_code_that_was_trusted_has_to_be_trusted_again(settings):
    lines = train(settings(model__trust_remote_code=True)).lines()
    assert lines[-2].endswith("model --trust-remote-code")
    assert " --set model.trust_remote_code=true --set activations.bits=4 " in lines[-1]
