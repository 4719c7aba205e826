"""What a run will need: simulated time, memory and disk, before anything starts."""

import dataclasses

import pytest
import torch

from astro.errors import ConfigError, RunError
from astro_dist import pipeline
from astro_dist.planning import estimate as estimates
from astro_dist.planning import forecast as forecasts
from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import DEVICES, Device
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.forecast import forecast
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.simulate import simulate
from astro_dist.planning.validate import prepare
from astro_dist.schedule.calls import Embed, EvaluateLoss, Forward
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.schedule import RunShape
from astro_dist.source.calibration_text import chunk_tokens
from astro_dist.worker.device_check import require_memory

SLOW = Device("slow", 1e9, 4e9, 2e9, 1e-6, 10**9, 1e8)


@pytest.fixture
def prepared(run_config):
    return prepare(run_config())


def every_call(prepared, workers=1):
    calls = []
    tokens = chunk_tokens(prepared.config.calibration)
    cost = CostModel(PlannedRun(prepared.plan, prepared.config, tokens, torch.float32, "cpu"))
    schedule = schedule_of(
        prepared.config, RunShape(len(prepared.plan.blocks), len(prepared.plan.copies), list(tokens))
    )
    simulate(schedule, workers, lambda call: calls.append(call) or 1.0, cost.result)
    return calls, cost


def test_forward_counts_two_operations_a_weight_and_token_and_those_of_attention(prepared):
    calls, cost = every_call(prepared)
    forwards = [cost.work(call) for call in calls if isinstance(call, Forward) and call.place == (0, 0)]
    weights = sum(linear.rows * linear.columns for linear in prepared.plan.blocks[0].linears)
    tokens = 9 * 48
    # attention multiplies each of 48 queries with as many keys, and its scores with values, in 64 columns of all heads
    assert sum(work.compute for work in forwards) == 2 * weights * tokens + 4 * tokens * 48 * 64
    assert all(work.elements > 0 for work in forwards)
    # q, k and v read 64 columns, o 64, gate and up 64, down 128; only calibration tokens count
    assert sum(work.exact for work in forwards) == 6 * 48 * (3 * 64**2 + 128**2)


def test_embed_and_head_move_and_compute_what_lies_outside_the_blocks(prepared):
    _, cost = every_call(prepared)
    outside = 2 * 260 * 64 + 64
    assert cost.work(Embed()).moved_bytes == 4 * (9 * 48 * 64 + outside)
    assert cost.work(EvaluateLoss("original")).compute == 2 * 3 * 48 * outside


@pytest.mark.parametrize("changes", [{}, {"execution__mode": "sequential"}, {"execution__rounds": 2}], ids=str)
def test_simulated_workers_are_never_faster_than_their_work(run_config, changes):
    prepared = prepare(run_config(**changes))
    walls = []
    for workers in (1, 2, 3, 8):
        calls, _ = every_call(prepared, workers)
        needed = estimates.estimate(prepared.config, prepared.plan, torch.float32, workers, SLOW)
        assert {call.unit for call in calls} == {call.unit for call in every_call(prepared, 1)[0]}
        assert sum(needed.by_verb_s.values()) <= workers * needed.wall_s * (1 + 1e-9)
        assert needed.efficiency <= 1 + 1e-9
        walls.append(needed.wall_s)
    assert walls == sorted(walls, reverse=True)
    assert walls[0] <= needed.efficiency * 8 * walls[-1] * (1 + 1e-9), "what is shared out costs more, never less"


def test_forecast_of_a_gpu_and_of_one_that_is_not_known(prepared):
    needed = forecast(prepared, 4, "h100")
    assert (needed.workers, needed.device) == (4, "h100")
    with pytest.raises(ConfigError, match="--device h1000: expected cpu or one of a100"):
        forecast(prepared, 4, "h1000")


def test_forecast_is_for_the_gpu_that_this_machine_has_unless_another_device_is_asked_for(prepared, monkeypatch):
    monkeypatch.setattr(forecasts, "gpu_here", lambda: DEVICES["a100"])
    kinds = {}
    for kind in ("auto", "cuda", "cpu"):
        execution = prepared.config.execution.model_copy(update={"device": kind})
        kinds[kind] = dataclasses.replace(prepared, config=prepared.config.model_copy(update={"execution": execution}))
    found = {kind: forecast(run, None, None).device for kind, run in kinds.items()}
    assert found == {"auto": "a100", "cuda": "a100", "cpu": "cpu"}
    assert forecast(kinds["auto"], None, "cpu").device == "cpu"


def test_device_that_is_too_small_is_refused(prepared, monkeypatch):
    monkeypatch.setitem(DEVICES, "toy", dataclasses.replace(DEVICES["h100"], name="toy", memory_bytes=10**8))
    with pytest.raises(
        ConfigError, match=r"a worker needs about 5.* MB, but a toy has 97.0 MB for it; lower calibration.chunk_samples"
    ):
        forecast(prepared, 1, "toy")
    with pytest.raises(RunError, match="a worker needs about 1.0 PB, but this machine has"):
        require_memory(10**15, torch.device("cpu"))


def test_disk_that_is_too_small_is_refused_before_anything_starts(run_config, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: free)
    with pytest.raises(
        ConfigError, match=r"output.dir .*run: the run needs about .* there, which is .* more than is free; free space"
    ):
        pipeline.quantize(run_config())
    assert not (tmp_path / "run" / "records").exists()


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
@pytest.mark.parametrize("weights", ["norm", "loss"])
def test_disk_is_never_needed_beyond_the_estimate(run_config, tmp_path, monkeypatch, mode, weights):
    """With as many blocks in flight as there are workers."""
    from astro_dist.run_directory.records import RunDirectory

    largest = [0]
    real = RunDirectory.drop

    def drop(self, spent):
        largest[0] = max(largest[0], sum(path.stat().st_size for path in self.root.rglob("*.safetensors")))
        return real(self, spent)

    monkeypatch.setattr(RunDirectory, "drop", drop)
    config = run_config(
        execution__workers=2, execution__mode=mode, calibration__samples=60, calibration__token_weights=weights
    )
    prepared = prepare(config)
    pipeline.quantize(config)
    size = DiskSize(
        PlannedRun(prepared.plan, config, chunk_tokens(config.calibration), torch.float32, "cpu")
    ).most_bytes(2)
    assert 0.4 * size < largest[0] < 1.1 * size
