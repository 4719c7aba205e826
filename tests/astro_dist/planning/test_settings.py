"""What a user asks for in one line becomes a whole configuration."""

import pytest
import transformers

from astro.errors import ConfigError, InputError
from astro_dist.planning.settings import run_config
from astro_dist.planning.starting_config import run_name
from astro_dist.planning.validate import prepare
from tests.support.models import LLAMA, write_checkpoint


def test_a_model_and_nothing_else_gets_groups_and_sequences_that_fit(llama):
    config = run_config(llama)
    assert config.quantization.group_size == 64  # 128 does not divide layers of 64 inputs
    assert prepare(config).config.calibration.sequence_length == LLAMA["max_position_embeddings"]
    assert str(config.output.dir) == "runs/llama-w4g64"


def test_options_of_the_command_line_are_keys(llama, tmp_path):
    config = run_config(
        llama, ["quantization.symmetric=false"], bits="3", group_size=32, output=tmp_path / "1e3",
        calibration="yes.txt", mode="sequential",
    )  # fmt: skip
    assert (config.quantization.bits, config.quantization.group_size, config.quantization.symmetric) == (3, 32, False)
    assert (config.calibration.source, config.execution.mode) == ("yes.txt", "sequential")
    assert config.output.dir == tmp_path / "1e3"


def test_layers_that_no_group_divides_get_one_scale_a_row(tmp_path):
    sizes = {"hidden_size": 40, "intermediate_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    model = write_checkpoint(tmp_path / "odd", transformers.LlamaConfig(**LLAMA | sizes))
    config = run_config(model)
    assert (config.quantization.group_size, config.quantization.indivisible) == (128, "per-channel")


def test_a_file_is_read_and_options_win_over_it(llama, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{source: {llama}}}\nquantization: {{bits: 8, group_size: 16}}\noutput: {{dir: there}}\n")
    config = run_config(path, bits=2)
    assert (config.quantization.bits, config.quantization.group_size, str(config.output.dir)) == (2, 16, "there")


@pytest.mark.parametrize(
    ("target", "keys", "message"),
    [
        ("nothing", {}, "nothing: there is no such file or folder; give the YAML file of a run, or a model"),
        ("nothing.yaml", {}, "nothing.yaml: no such configuration file"),
        ("a/b", {"bits": 5, "mode": "blocks"}, "a/b with quantization.bits: expected 2, 3, 4, 8 or auto, got 5"),
        ("a/b", {"mode": "fast"}, "a/b with execution.mode: expected 'blocks', 'stages' or 'sequential', got 'fast'"),
        ("/nowhere/model", {}, "/nowhere/model: no such folder"),
    ],
)
def test_what_is_wrong_is_said(target, keys, message):
    with pytest.raises(InputError) as error:
        run_config(target, **keys)
    assert str(error.value).startswith(message)


def test_a_key_that_is_set_twice_is_refused(llama):
    for assignment in ("quantization.group_size=32", "quantization={bits: 3}"):
        with pytest.raises(ConfigError, match="quantization.group_size: set both by --group-size and by --set; leave"):
            run_config(llama, ["calibration.samples=8", assignment], group_size=16)
    assert run_config(llama, ["quantization.bits=3"]).quantization.bits == 3


def test_an_unknown_key_of_a_program_is_an_error_of_the_program():
    with pytest.raises(TypeError, match="got bit; expected bits, "):
        run_config("a/b", bit=4)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/Llama-3.1-8B", "Llama-3.1-8B-w4g128"), ("demo:smollm2-135m", "smollm2-135m-w4g128"),
        ("/models/tiny/", "tiny-w4g128"), ("s3://bucket/a b?scheme=http", "a-b-w4g128"),
    ],
)  # fmt: skip
def test_names_of_runs_come_from_the_model_and_the_grid(source, name, run_config):
    assert run_name(source, run_config(quantization__group_size=128)) == name


@pytest.mark.parametrize("source", [".", "./", "../my model"])
def test_names_of_runs_in_a_folder_are_the_folders(source, run_config, tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    monkeypatch.chdir(tmp_path / "my model")
    assert run_name(source, run_config(quantization__group_size=128)) == "my-model-w4g128"


def test_name_of_a_run_of_a_trained_model_is_the_trainings(run_config, tmp_path):
    (tmp_path / "my-training" / "model").mkdir(parents=True)
    source = str(tmp_path / "my-training" / "model")
    assert run_name(source, run_config(quantization__group_size=128)) == "my-training-w4g128"
    assert run_name("org/model", run_config(quantization__group_size=128)) == "model-w4g128"


def test_names_of_runs_tell_widths(run_config):
    auto = {"bits": "auto", "average_bits": 3.5, "group_size": -1}
    config = run_config(execution__rounds=2, **{f"quantization__{key}": value for key, value in auto.items()})
    assert run_name("a/b", config) == "b-w3.5"
    assert run_name("a/b", run_config(activations__bits=8)) == "b-w4a8g32"
    assert run_name("a/b", run_config(activations__bits=8, activations__type="float")) == "b-w4afp8g32"
