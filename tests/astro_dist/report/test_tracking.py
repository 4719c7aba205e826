"""Libraries that track experiments, in whose place a module stands that notes what it is told."""

import sys
from types import ModuleType

import pytest

from astro.errors import ConfigError, RunError
from astro_dist import pipeline
from astro_dist.worker.worker import Worker

LOG = {"trackio": "log", "wandb": "log", "mlflow": "log_metrics"}
BEGIN = {"trackio": "init", "wandb": "init", "mlflow": "start_run"}
END = {"trackio": "finish", "wandb": "finish", "mlflow": "end_run"}


@pytest.fixture
def library(monkeypatch):
    """A module of a given name; its calls are in `calls`, and those of `broken` raise."""

    def make(name, broken=()):
        module = ModuleType(name)
        module.calls = []

        def function(verb):
            def called(*args, **options):
                if verb in broken:
                    raise ValueError(f"{verb}: nobody is logged in")
                module.calls.append((verb, args, options))

            return called

        module.__getattr__ = function
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    return make


def of(module, verb):
    return [(args, options) for called, args, options in module.calls if called == verb]


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_blocks_and_the_summary_are_logged(library, run_config, name):
    module = library(name)
    summary = pipeline.quantize(run_config(output__track=name))
    ((_, begun),) = of(module, BEGIN[name])
    assert begun.get("name", begun.get("run_name")) == "run"
    settings = begun["config"] if name != "mlflow" else of(module, "log_params")[0][0][0]
    assert settings["quantization.group_size"] == "32"
    *blocks, (last, _) = of(module, LOG[name])
    assert [options["step"] for _, options in blocks] == [values["blocks_done"] for (values,), _ in blocks]
    assert [options["step"] for _, options in blocks] == list(range(1, summary.units.blocks + 1))
    assert blocks[-1][0][0]["largest_layer_error"] > 0
    assert last[0]["perplexity_quantized"] == summary.perplexity.quantized
    assert module.calls[-1][0] == END[name]
    module.calls.clear()
    pipeline.quantize(run_config(output__track=name))
    assert module.calls == [], "the run was finished"


@pytest.mark.parametrize(
    ("name", "end"), [("wandb", ((), {"exit_code": 1})), ("mlflow", (("FAILED",), {})), ("trackio", ((), {}))]
)
def test_failed_session_ends_as_failed_and_the_next_goes_on(library, run_config, monkeypatch, name, end):
    module, solve, solved = library(name), Worker.solve_block, []

    def solve_one(self, call):
        if solved:
            raise TypeError("no such argument")
        solved.append(call)
        return solve(self, call)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "solve_block", solve_one)
        with pytest.raises(RunError):
            pipeline.quantize(run_config(output__track=name))
    assert of(module, END[name]) == [end]
    module.calls.clear()
    blocks = pipeline.quantize(run_config(output__track=name)).units.blocks
    assert [options["step"] for _, options in of(module, LOG[name])] == [*range(2, blocks + 1), blocks]


def test_library_that_is_missing_is_told_before_anything_starts(run_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"output\.track: wandb cannot be loaded .* pip install wandb"):
        pipeline.quantize(run_config(output__track="wandb"))
    assert not (tmp_path / "run").exists()


def test_library_that_cannot_begin_ends_the_command_before_workers_start(library, run_config, monkeypatch):
    library("wandb", broken=["init"])
    monkeypatch.setattr(pipeline, "_make_executor", None)
    with pytest.raises(RunError, match=r"output\.track: wandb could not begin: init: nobody is logged in"):
        pipeline.quantize(run_config(output__track="wandb"))


def test_library_that_fails_later_does_not_end_the_run(library, run_config, caplog):
    library("wandb", broken=["log", "finish"])
    assert pipeline.quantize(run_config(output__track="wandb")).units.blocks
    assert "wandb did not take the figures: log: nobody is logged in; the run goes on" in caplog.text


def test_tracking_is_no_part_of_a_runs_identity_or_card(library, run_config, tmp_path):
    library("wandb")
    assert run_config(output__track="wandb").arithmetic() == run_config().arithmetic()
    pipeline.quantize(run_config(output__track="wandb"))
    assert "track:" not in (tmp_path / "run" / "model" / "README.md").read_text()
