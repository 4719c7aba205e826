"""Keys are explained by their docstrings, everywhere alike."""

import jsonschema
import pytest
import yaml

from astro.errors import ConfigError
from astro_dist.config.explanation import commented_defaults, explain, json_schema, starting_yaml
from astro_dist.config.keys import fields_of
from astro_dist.config.schema import RunConfig

CONFIG = RunConfig.model_validate({"model": {"source": "a/b"}, "quantization": {"bits": 3}, "output": {"dir": "x"}})
KEYS = [f"{section}.{key}" for section, kind in fields_of(RunConfig).items() for key in fields_of(kind)]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_explained_in_sentences(key):
    head, _, text = explain(key).partition("\n")
    assert head.startswith(f"{key} (")
    assert text[0].isupper() or text[0] == "`"
    assert text.endswith(".")


def test_a_key_shows_its_values_and_its_default():
    assert explain("quantization.bits").startswith("quantization.bits (a whole number or auto; default 4)\n")
    assert explain("execution.mode").startswith("execution.mode (blocks, stages or sequential; default blocks)\n")
    assert explain("calibration.chunk_samples").startswith("calibration.chunk_samples (a whole number or auto; default")
    assert explain("calibration.token_weights").startswith("calibration.token_weights (loss, norm or none; default lo")
    assert explain("model.source").startswith("model.source (text; it must be given)\n")
    assert explain("quantization.overrides").startswith("quantization.overrides (a mapping; default {})\n")


def test_a_section_lists_its_keys():
    lines = explain("experts").splitlines()
    assert [line.partition(":")[0] for line in lines[2:]] == ["experts.min_tokens", "experts.policy"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("quantisation", "no section 'quantisation' (did you mean quantization?)"),
        ("quantization.bit", "quantization has no key 'bit' (did you mean bits?)"),
        ("calibration.zzz", "calibration has no key 'zzz'; known here: source, "),
    ],
)
def test_what_does_not_exist_is_refused(key, message):
    with pytest.raises(ConfigError) as error:
        explain(key)
    assert message in str(error.value)


def test_commented_defaults_are_the_defaults():
    shown = yaml.safe_load(commented_defaults())
    assert RunConfig.model_validate(shown).plain() == shown
    assert [f"{section}.{key}" for section, keys in shown.items() for key in keys] == KEYS


@pytest.mark.parametrize(
    ("key", "comment"),
    [
        ("mode", "  # The order of blocks and layers. (blocks, stages or sequential)"),
        ("workers", "  # The number of workers. (a whole number or auto)"),
        ("compute_dtype", " activations. (auto, float32, bfloat16 or float16)"),
        ("track", "none. (trackio, wandb, mlflow or nothing)"),
        ("method", "nearest."),  # the sentence names both
        ("source", "the quickstart."),
    ],
)
def test_choices_that_a_comment_does_not_name_follow_it(key, comment):
    lines = commented_defaults().splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(f"  {key}:"))
    assert lines[place - 1].endswith(comment)


def test_starting_file_keeps_what_was_set():
    text = starting_yaml(CONFIG)
    assert yaml.safe_load(text)["quantization"]["bits"] == 3
    assert RunConfig.model_validate(yaml.safe_load(text)) == CONFIG
    assert max(map(len, text.splitlines())) <= 100


def test_json_schema_takes_what_the_program_takes_and_explains_it():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(CONFIG.plain(), schema)
    with pytest.raises(jsonschema.ValidationError, match="'bites' was unexpected"):
        jsonschema.validate({"model": {"source": "a"}, "output": {"dir": "b"}, "quantization": {"bites": 4}}, schema)
    solver = schema["$defs"]["Quantization"]["properties"]
    assert solver["damping"]["description"].startswith("Share of the mean diagonal")
    assert all(
        "description" in key
        for kind in fields_of(RunConfig).values()
        for key in schema["$defs"][kind.__name__]["properties"].values()
    )
