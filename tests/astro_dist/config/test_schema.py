"""One YAML is one whole run; a key that is not known is an error with its path."""

from pathlib import Path

import pytest

from astro.errors import ConfigError
from astro_dist.config.schema import RunConfig, run_key
from astro_dist.config.yaml_file import load_config, load_recorded_config

MINIMAL_KEYS = RunConfig.model_validate({"model": {"source": "x"}, "output": {"dir": "r"}}).plain()
ROOT = Path(__file__).parents[3]
MINIMAL = "model: {source: x}\noutput: {dir: r}\n"


@pytest.fixture
def write(tmp_path):
    def build(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return build


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    assert load_config(path).output.dir


def test_resolved_config_reads_back_the_same(write):
    config = load_config(write(MINIMAL), ["quantization.bits=3", "quantization.ignore=[a.*, b]"])
    assert load_config(write(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "quantization: {bit: 3}", r"unknown key quantization.bit \(did you mean bits\?\)"),
        (MINIMAL + "regularizer: {gamma: 3}", "unknown key regularizer.gamma; known here: name, beta"),
        (MINIMAL + "quantization: {odd_widths: keep}", r"key quantization.odd_widths \(it is called indivisible now\)"),
        (MINIMAL + "excution: {}", r"unknown key excution \(did you mean execution\?\)"),
        (MINIMAL + "quantization: {bits: 5}", "quantization.bits: expected 2, 3, 4, 8 or auto, got 5"),
        (
            "model: {source: x, name: llama}\noutput: {dir: r}",
            "model.name: expected ORG/NAME of a model on the Hub, got 'llama'",
        ),
        (MINIMAL + "publish: {repo: me}", "publish.repo: expected ORG/NAME of a model repository, got 'me'"),
        (MINIMAL + "publish: {repository: a/b}", "unknown key publish.repository; known here: repo, private"),
        (MINIMAL + "activations: {bits: 6}", "activations.bits: expected 16, 8 or 4, got 6"),
        (MINIMAL + "activations: {type: float}", "activations.type: float is FP8 and wants bits: 8, got bits: 16"),
        (MINIMAL + "activations: {clips: from-checkpoint}", "clips: from-checkpoint says .* and bits: 16 rounds none"),
        (
            MINIMAL + "activations: {bits: 8, type: float, clips: from-checkpoint}",
            "clips: from-checkpoint rounds inputs to integers, got type: float; take type: int",
        ),
        (
            MINIMAL + "activations: {bits: 4, smoothing: aser, clips: from-checkpoint}",
            "clips: from-checkpoint holds for inputs as training made them, and smoothing: aser makes them smaller",
        ),
        (
            MINIMAL + "quantization: {format: gptq}\nactivations: {bits: 4, clips: from-checkpoint}",
            "activations.bits: 4 wants quantization.format: compressed-tensors",
        ),
        (
            MINIMAL + "quantization: {format: gptq}\nactivations: {bits: 8}",
            "activations.bits: 8 wants quantization.format: compressed-tensors",
        ),
        (MINIMAL + "calibration: {samples: 0}", "calibration.samples: expected auto or at least 1, got 0"),
        (MINIMAL + "calibration: {text_column: a}", r"key calibration.text_column \(it is called column now\)"),
        (
            MINIMAL + "calibration: {sources: [{source: a, shar: 1}]}",
            r"calibration.sources.0.shar \(did you mean share",
        ),
        (
            MINIMAL + "calibration: {sources: [{source: a, share: 0.5}, {source: b, share: 0.4}]}",
            "calibration.sources: the shares add up to 0.9, expected 1",
        ),
        (
            MINIMAL + "calibration: {column: text, sources: [{source: a, share: 1}]}",
            "calibration.column: write it into each of calibration.sources",
        ),
        (MINIMAL + "execution: {workers: 0}", "workers: expected auto or at least 1, got 0"),
        (MINIMAL + "execution: {device: tpu}", "execution.device: .*got 'tpu'"),
        (MINIMAL + "execution: {mode: sequential, rounds: 2}", "rounds: only in mode blocks, got 2"),
        (
            MINIMAL + "quantization: {bits: auto, average_bits: 3}",
            "c.yaml: quantization.bits: auto wants .*rounds of at least 2",
        ),
        (MINIMAL + "quantization: {bits: auto}", "bits: auto wants average_bits, e.g. 3.5"),
        (MINIMAL + "quantization: {average_bits: 3}", "average_bits: only with bits: auto"),
        (
            MINIMAL + "quantization: {bits: auto, average_bits: 9}",
            r"average_bits: expected 2 to 8 \(bit_choices\), got 9",
        ),
        (MINIMAL + "quantization: {bit_choices: [4, 5]}", r"bit_choices: expected different widths .* got \[4, 5\]"),
        (MINIMAL + "quantization: {compensation: 2}", "compensation: expected auto or 0 to 1, got 2"),
        (MINIMAL + "quantization: {refine_passes: -1}", "refine_passes: expected 0 to 100, got -1"),
        (MINIMAL + "quantization: {refine_tolerance: -1}", "refine_tolerance: expected a number >= 0, got -1"),
        (MINIMAL + "quantization: {overrides: {'*.o': {bits: 5}}}", "bits: expected 2, 3, 4 or 8, got 5"),
        (MINIMAL + "quantization: {overrides: {'*.o': {}}}", "expected at least one of bits, group_size, symmetric"),
        (
            MINIMAL + "quantization: {overrides: {'*.o': {bit: 4}}}",
            r"unknown key quantization.overrides.*\.bit \(did you mean bits",
        ),
        (
            MINIMAL + "execution: {workers: many, threads_per_worker: 1.5}",
            r"^\S+: execution.threads_per_worker: expected a whole number or 'auto', got 1.5; "
            r"execution.workers: expected a whole number or 'auto', got 'many'$",
        ),
        (MINIMAL + "quantization: {symmetric: 3, ignore: x}", "symmetric: expected true or false, got 3; .*a list"),
        (MINIMAL + "regularizer: {beta: strong}\npublish: 7", "beta: expected a number or 'auto', .*a mapping, got 7"),
        (
            MINIMAL + "execution: {compile: perhaps}",
            r"^\S+: execution.compile: expected true .* or 'kernels', got 'perhaps'$",
        ),
        (MINIMAL + "quantization: {int: 4, str: 3}", r"unknown key quantization.int; .*unknown key quantization.str;"),
        (
            MINIMAL + "quantization: {overrides: {int: {bits: x}, float: {bits: x}}}",
            r"overrides.int.bits: expected a whole number, got 'x'; .*overrides.float.bits: expected a whole",
        ),
        ("model: {source: x}", "output.dir: missing"),
        (MINIMAL + "quantization: {bits: }", "quantization.bits: expected a whole number or 'auto', got nothing"),
        ("- 1", "expected a mapping of sections"),
        ("{", r"""cannot be read as YAML: while parsing [^"]* in "\S*c.yaml", line 1"""),
        (MINIMAL + "execution: {call_timeout_s: .nan}", "call_timeout_s: expected auto or more than 0, got nan"),
        (MINIMAL + "calibration: {samples: yes}", "calibration.samples: expected a number, got true .YAML"),
        (MINIMAL + "quantization: {bits: on, damping: 1}", "quantization.bits: expected a number, got true"),
        (MINIMAL + "quantization: {bit_choices: [4, on]}", "quantization.bit_choices: expected a number, got true"),
        (MINIMAL + "quantization: {bit_choices: on}", "quantization.bit_choices: expected a list, got True"),
        (
            MINIMAL + "quantization: {group_size: [on]}",
            r"quantization.group_size: expected a whole number, got \[True\]",
        ),
        (MINIMAL + "quantization: {bits: on, group_sise: 64}", "bits: expected a number.* unknown key .*group_sise"),
        (MINIMAL + "quantization: {bit_choices: &a [*a]}", "holds something that contains itself: an alias"),
        (
            MINIMAL + "quantization: {overrides: {'a.*': {bits: no}}}",
            r"overrides.a.\*.bits: expected a number, got false",
        ),
        (MINIMAL + "quantization:\n  bits: 4\n  bits: 3\n", "cannot be read as YAML: the key 'bits' is there twice"),
        (MINIMAL + "model: {source: y}\n", "the key 'model' is there twice"),
    ],
)
def test_wrong_configs_are_explained(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text))


def test_configs_that_a_finished_run_of_an_earlier_version_holds_are_read(write):
    path = write(MINIMAL + "quantization: {odd_widths: keep, bits: 3}\ncalibration: {text_column: body}")
    config = load_recorded_config(path)
    assert (config.quantization.indivisible, config.calibration.column) == ("keep", "body")
    with pytest.raises(ConfigError, match=r"c.yaml: unknown key quantization.bit "):
        load_recorded_config(write(MINIMAL + "quantization: {bit: 3}"))


def test_overrides_apply_in_their_order(write):
    text = MINIMAL + "quantization: {overrides: {'*.down': {bits: 8}, 'm.0.*': {bits: 3, symmetric: false}}}"
    settings = load_config(write(text)).quantization
    schemes = {name: settings.scheme(name, 128) for name in ("m.0.down", "m.1.down", "m.1.up")}
    assert {name: (scheme.bits, scheme.symmetric) for name, scheme in schemes.items()} == {
        "m.0.down": (3, False), "m.1.down": (8, True), "m.1.up": (4, True),
    }  # fmt: skip


def test_width_that_is_set_is_not_touched_by_the_budget(write):
    text = MINIMAL + (
        "execution: {rounds: 2}\nquantization: {bits: auto, average_bits: 3.5, overrides: {'*.down': {bits: 8}}}"
    )
    settings = load_config(write(text)).quantization
    assert [settings.bits_of(name) for name in ("a.up", "a.down")] == ["auto", 8]
    assert [settings.scheme(name, 128, chosen_bits=2).bits for name in ("a.up", "a.down")] == [2, 8]
    assert [scheme.bits for scheme in settings.possible_schemes("a.up", 128)] == [2, 3, 4, 8]
    with pytest.raises(ConfigError, match="bits: auto: no width was chosen for a.up"):
        settings.scheme("a.up", 128)


@pytest.mark.parametrize(("policy", "group_size"), [("fail", 128), ("per-channel", -1), ("keep", 128)])
def test_indivisible_layers_have_the_scheme_that_their_policy_says(write, policy, group_size):
    settings = load_config(write(MINIMAL + f"quantization: {{indivisible: {policy}}}")).quantization
    assert [settings.is_indivisible("m.up", columns) for columns in (96, 256)] == [True, False]
    assert [settings.scheme("m.up", columns).group_size for columns in (96, 256)] == [group_size, 128]


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, expected the YAML file of a run"):
        load_config(tmp_path)


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml: no such configuration file"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize("assignment", ["bits", "=3", "quantization..bits=3", "model.source.x=1", "a=[", ".=1"])
def test_wrong_assignments_are_explained(write, assignment):
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(MINIMAL), [assignment])


@pytest.mark.parametrize("assignment", ["quantization.bits=5", "quantization.bit=4", "excution.mode=blocks"])
def test_it_is_said_whether_the_file_or_an_assignment_is_wrong(write, assignment):
    with pytest.raises(ConfigError, match=rf"^\S+\.yaml with {assignment.partition('=')[0]}: "):
        load_config(write(MINIMAL), [assignment])
    with pytest.raises(ConfigError, match=r"\.yaml: quantization.bits: expected .*, got 5$"):
        load_config(write(MINIMAL + "quantization: {bits: 5}"), ["quantization.group_size=64"])


def test_what_is_wrong_in_the_file_is_said_of_the_file(write):
    with pytest.raises(ConfigError, match=r"c.yaml: unknown key quantization.group_sise"):
        load_config(write(MINIMAL + "quantization: {bits: on, group_sise: 64}"), ["quantization.bits=4"])


def test_key_ignores_where_a_run_happens_but_not_what_it_computes(write):
    base = load_config(write(MINIMAL))
    key = run_key(base, "f", "1")

    def other(assignment):
        return run_key(load_config(write(MINIMAL), [assignment]), "f", "1")

    assert other("execution.workers=7") == other("output.dir=elsewhere") == other("model.source=copy") == key
    changed = [other("quantization.bits=3"), other("execution.threads_per_worker=2"), other("calibration.seed=1")]
    changed += [run_key(base, "g", "1"), run_key(base, "f", "2")]
    assert len({key, *changed}) == 6


def test_threads_that_a_node_decides_are_no_part_of_the_key(write):
    keys = {
        run_key(load_config(write(MINIMAL), [f"execution.threads_per_worker={threads}"]), "f", "1")
        for threads in ("auto", 1)
    }
    assert len(keys) == 1  # on a CPU `auto` is one thread, on a GPU the number decides no byte


ELSEWHERE = {
    *(f"{section}.{key}" for section in ("model", "output", "publish") for key in MINIMAL_KEYS[section]),
    *(f"calibration.{key}" for key in ("source", "subset", "split", "revision", "column", "sources")),
    "execution.executor", "execution.workers", "execution.device", "execution.device_memory_gb",
    "execution.ray_address", "execution.max_retries", "execution.call_timeout_s", "execution.worker_timeout_s",
}  # fmt: skip
"""Every key that may change without making another run of it."""


def key_with(monkeypatch, path, value):
    """The key of a run whose configuration holds a value at a path."""
    config = RunConfig.model_validate({"model": {"source": "x"}, "output": {"dir": "r"}})
    plain, (section, key) = config.plain(), path.split(".")
    plain.setdefault(section, {})[key] = value
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "plain", lambda self: plain)
        return run_key(config, "f", "1")


@pytest.mark.parametrize("path", [f"{section}.{key}" for section, keys in MINIMAL_KEYS.items() for key in keys])
def test_every_key_counts_unless_it_only_says_where_a_run_happens(monkeypatch, path):
    changed = key_with(monkeypatch, path, "changed") != key_with(monkeypatch, path, "other")
    assert changed == (path not in ELSEWHERE)


@pytest.mark.parametrize("path", ["quantization.new", "calibration.new", "execution.new", "section.new"])
def test_key_that_nobody_has_listed_counts(monkeypatch, path):
    assert key_with(monkeypatch, path, 1) != key_with(monkeypatch, path, 2)


def test_keys_that_decide_bytes(write):
    arithmetic = load_config(write(MINIMAL)).arithmetic()
    assert arithmetic.keys() == {
        "quantization", "activations", "regularizer", "reconstruction", "experts", "calibration", "execution",
    }  # fmt: skip
    assert arithmetic["calibration"].keys() == {
        "samples", "sequence_length", "chunk_samples", "holdout_samples", "seed", "token_weights",
    }  # fmt: skip
    assert arithmetic["execution"].keys() == {
        "mode", "rounds", "hessian_shares", "compute_dtype", "threads_per_worker", "compile",
        "tile_weights",
    }  # fmt: skip
