"""The contract of executors: actors on a real Ray cluster write the bytes that one process writes."""

import os
import signal
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from astro.errors import (
    AstroError,
    CheckpointError,
    ConfigError,
    DamagedError,
    InputError,
    NumericalError,
    RunError,
    StorageError,
)
from astro_dist import pipeline
from astro_dist.config.schema import ExecutionConfig
from astro_dist.execution.ray_executor import RayExecutor
from astro_dist.report.run_figures import FIGURES
from astro_dist.schedule.calls import Backward, WeighTokens
from astro_dist.worker.worker import Worker
from tests.support.models import files_of

pytestmark = pytest.mark.ray
LOSS = {"calibration__token_weights": "loss", "calibration__chunk_samples": 2}


@pytest.fixture(scope="module")
def cluster():
    """A private cluster of three CPUs on this machine."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def wait_for_all(monkeypatch):
    """Let a run begin when all its actors are up but for so many, as no run would wait."""
    idle = RayExecutor.idle

    def begin_with(missing):
        def idle_if_all_are_up(self):
            return idle(self) if sum(call.kind != "call" for call in self._calls.values()) <= missing else []

        monkeypatch.setattr(RayExecutor, "idle", idle_if_all_are_up)

    return begin_with


def test_local_and_ray_with_one_two_and_three_workers_write_the_same_bytes(cluster, run_config, tmp_path, wait_for_all):
    wait_for_all(missing=0)
    pipeline.quantize(run_config(output__dir=str(tmp_path / "local")))
    expected = files_of(tmp_path / "local" / "model")
    for workers in (1, 2, 3):
        folder = tmp_path / f"ray{workers}"
        config = run_config(execution__executor="ray", execution__workers=workers, output__dir=str(folder))
        summary = pipeline.quantize(config)
        assert files_of(folder / "model") == expected
        assert len(summary.peak_rss_bytes) == workers + 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"execution__mode": "sequential"}, {"execution__rounds": 2}, LOSS], ids=str)
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


def test_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(cluster, run_config, tmp_path, monkeypatch):
    """Killed in its solve by itself, as the kernel does when memory runs out."""
    once = tmp_path / "killed"
    real = Worker.solve_block

    def killed_once(self, call):
        if call.block == 1 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, call)

    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole")))
    monkeypatch.setattr(Worker, "solve_block", killed_once)
    summary = pipeline.quantize(run_config(execution__executor="ray", execution__workers=2))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")
    (retry,) = summary.retries
    assert (retry.unit, retry.method, retry.kind) == ("round-0-block-0001", "solve block", "lost")


@pytest.mark.parametrize("call", [Backward(1, "c0001"), WeighTokens(1)], ids=lambda call: type(call).__name__)
def test_worker_that_is_killed_while_the_gradient_passes_back_is_replaced(
    cluster, run_config, tmp_path, monkeypatch, call
):
    once, real = tmp_path / "killed", Worker.weigh_tokens

    def killed_once(self, made):
        if made == call and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, made)

    pipeline.quantize(run_config(output__dir=str(tmp_path / "whole"), **LOSS))
    monkeypatch.setattr(Worker, "weigh_tokens", killed_once)
    summary = pipeline.quantize(run_config(execution__executor="ray", execution__workers=3, **LOSS))
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "whole" / "model")
    (retry,) = summary.retries
    assert (retry.unit, retry.kind) == (call.unit, "lost")


def test_worker_that_hangs_is_given_up_and_past_the_retries_the_error_names_the_unit(cluster, run_config, monkeypatch):
    monkeypatch.setattr(Worker, "solve_block", lambda self, call: time.sleep(3600))
    config = run_config(
        execution__executor="ray", execution__workers=2, execution__call_timeout_s=2.0, execution__max_retries=0
    )
    with pytest.raises(
        RunError, match=r"block \d of 3, solve block on worker \d: took longer than its deadline of 2 s. Attempt 1 of 1"
    ):
        pipeline.quantize(config)


def test_worker_that_hangs_at_its_start_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr(Worker, "prepare", lambda self, warms_up: time.sleep(3600))
    monkeypatch.setattr("astro_dist.execution.ray_executor._START_TIMEOUT_S", 0.5)
    executor = RayExecutor(ExecutionConfig(workers=1))
    executor.start(SimpleNamespace(threads=1, device="cpu"))
    event, end = None, time.monotonic() + 60
    while event is None and time.monotonic() < end:
        event = executor.wait(0.2)
    executor.close()
    assert event is not None
    assert (event.worker, str(event.error)) == (0, "did not open the source within 0 s")


def test_more_workers_than_the_cluster_has_wait_for_room(cluster, run_config, wait_for_all):
    wait_for_all(missing=1)
    summary = pipeline.quantize(run_config(execution__executor="ray", execution__workers=4))
    # Which three find room is up to Ray.
    assert len(summary.peak_rss_bytes.keys() & {"worker-0", "worker-1", "worker-2", "worker-3"}) == 3


def test_cluster_without_room_for_a_worker(cluster):
    with pytest.raises(RunError, match=r"the cluster has 0 GPUs and 3 CPUs on 1 node, not enough for one worker of 4"):
        RayExecutor(ExecutionConfig(threads_per_worker=4))


def test_cluster_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: (_ for _ in ()).throw(ConnectionError("refused")))
    with pytest.raises(RunError, match="Ray cluster on this machine: cannot be reached or started: refused"):
        RayExecutor(ExecutionConfig())


def test_gpus_that_this_machine_has_not_are_refused(monkeypatch):
    for name, found in {"is_initialized": False, "init": None, "shutdown": None}.items():
        monkeypatch.setattr(ray, name, lambda *_, found=found, **__: found)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="execution.device: cuda, but Ray sees no GPU on this machine"):
        RayExecutor(ExecutionConfig(device="cuda"))
    # To a cluster that is named they may still come.
    assert RayExecutor(ExecutionConfig(device="cuda", workers=2, ray_address="10.0.0.1:6379")).has_gpus


@pytest.mark.parametrize(
    ("threads", "expected"), [("auto", (6, 1, 10)), (4, (4, 4, 10)), (16, (16, 16, 4))], ids=["auto", "4", "16"]
)
def test_gpus_share_the_cpus_of_their_node(monkeypatch, threads, expected):
    nodes = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 12.0, "GPU": 2.0}, {"CPU": 4.0}]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    executor = RayExecutor(ExecutionConfig(threads_per_worker=threads))
    asked = {}
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=asked.update))
    monkeypatch.setattr(RayExecutor, "_add", lambda self: None)
    executor.start(SimpleNamespace(threads=executor.threads))
    # A worker of 16 CPUs finds room four times on the first node, never on the second.
    assert (executor.threads, asked["num_cpus"], executor.num_workers) == expected


def test_damage_survives_the_way_through_a_cluster_with_its_path(cluster):
    @ray.remote
    def fail():
        raise DamagedError(Path("run/part"), "its checksum is wrong")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote())
    assert caught.value.cause.path == Path("run/part")
    assert str(caught.value.cause) == "run/part: its checksum is wrong"


@pytest.mark.parametrize("kind", [AstroError, InputError, CheckpointError, NumericalError, RunError, StorageError])
def test_errors_survive_the_way_through_a_cluster(cluster, kind):
    @ray.remote
    def fail():
        raise kind("what, where and what to do")

    with pytest.raises(kind, match="what, where and what to do"):
        ray.get(fail.remote())


def test_figures_of_a_run_are_metrics_of_the_cluster(cluster, run_config, tmp_path):
    """Ray's agent of the node offers them to Prometheus, a few seconds later."""
    blocks = pipeline.quantize(run_config(execution__executor="ray", execution__workers=1)).units.blocks
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url, samples, due = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", {}, time.time() + 60
    while samples.get("ray_astro_dist_share_done") != 1 and time.time() < due:
        time.sleep(0.5)
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_astro_dist_") and 'run="run"' in line]
        samples = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in ours}
    assert samples.keys() == {f"ray_astro_dist_{name}" for name in FIGURES}
    assert samples["ray_astro_dist_blocks"] == samples["ray_astro_dist_blocks_done"] == blocks
    assert samples["ray_astro_dist_tokens_per_second"] > 0
