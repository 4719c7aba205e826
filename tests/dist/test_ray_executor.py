"""The contract of executors: actors on a real Ray cluster write the bytes that one process writes."""

import os
import signal

import pytest
import ray

from astro.errors import AstroError, CheckpointError, InputError, NumericalError, RunError
from astro_dist import pipeline
from astro_dist.config import ExecutionConfig
from astro_dist.ray_executor import RayExecutor
from tests.conftest import files_of

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """A private cluster of three CPUs on this machine."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def test_local_and_ray_with_one_two_and_three_workers_write_the_same_bytes(cluster, run_config, tmp_path):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "local")))
    expected = files_of(tmp_path / "local" / "model")
    for workers in (1, 2, 3):
        folder = tmp_path / f"ray{workers}"
        config = run_config(execution__executor="ray", execution__workers=workers, output__dir=str(folder))
        summary = pipeline.quantize(config)
        assert files_of(folder / "model") == expected
        assert len(summary["peak_rss_bytes"]) == workers + 1


@pytest.mark.parametrize("mode", [{"execution__mode": "sequential"}, {"execution__rounds": 2}], ids=str)
def test_other_modes_write_the_same_bytes_on_ray(cluster, run_config, tmp_path, mode):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "local"), **mode))
    folder = tmp_path / "ray"
    config = run_config(execution__executor="ray", execution__workers=3, output__dir=str(folder), **mode)
    pipeline.quantize(config)
    assert files_of(folder / "model") == files_of(tmp_path / "local" / "model")


def test_source_that_differs_from_the_drivers_is_refused_by_the_worker(cluster, run_config, llama, monkeypatch):
    real = pipeline._make_executor

    def another_source_on_the_workers(config):
        (llama / "config.json").write_text((llama / "config.json").read_text() + " ")
        return real(config)

    monkeypatch.setattr(pipeline, "_make_executor", another_source_on_the_workers)
    with pytest.raises(RunError, match="is not the checkpoint that the driver sees under this path"):
        pipeline.quantize(run_config(execution__executor="ray"))


def test_worker_that_is_killed_ends_the_run_with_its_unit_and_the_next_goes_on(cluster, run_config, tmp_path, monkeypatch):
    config = run_config(execution__executor="ray", execution__workers=2)
    real = pipeline._drive

    def drive(prepared, schedule, executor, display, run):
        done = schedule.done
        pids = [ray.get(actor.__ray_call__.remote(lambda self: os.getpid())) for actor in executor._actors]

        def kill_after_the_first_block(worker, call, result):
            done(worker, call, result)
            if call.method == "solve" and call.args == (0, 0):
                os.kill(pids[worker], signal.SIGKILL)

        monkeypatch.setattr(schedule, "done", kill_after_the_first_block)
        return real(prepared, schedule, executor, display, run)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_drive", drive)
        with pytest.raises(RunError, match=r"(block|copy|evaluate)-000\d, \w+ on worker \d: the worker died"):
            pipeline.quantize(config)
    assert (tmp_path / "run" / "records" / "round-0-block-0000.json").is_file()
    pipeline.quantize(config)
    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole")))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")


def test_more_workers_than_the_cluster_has(cluster):
    with pytest.raises(RunError, match=r"execution.workers: 4 asked for, but the cluster has 0 GPUs and 3 CPUs on 1 node"):
        RayExecutor(ExecutionConfig(workers=4))


def test_cluster_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: (_ for _ in ()).throw(ConnectionError("refused")))
    with pytest.raises(RunError, match="Ray cluster 127.0.0.1:1: cannot be reached or started: refused"):
        RayExecutor(ExecutionConfig(ray_address="127.0.0.1:1"))


@pytest.mark.parametrize("kind", [AstroError, InputError, CheckpointError, NumericalError, RunError])
def test_errors_survive_the_way_through_a_cluster(cluster, kind):
    @ray.remote
    def fail():
        raise kind("what, where and what to do")

    with pytest.raises(kind, match="what, where and what to do"):
        ray.get(fail.remote())
