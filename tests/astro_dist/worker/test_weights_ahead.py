"""The next block's weights are read while one is solved, where that does not take the solve's memory."""

import threading

import pytest

from astro.storage.checkpoint import Checkpoint
from astro_dist import pipeline
from astro_dist.schedule.calls import DifferentiateLoss, LoadWeights, SolveBlock
from astro_dist.worker import block_runner, share_merger
from astro_dist.worker.split_block import BlockInParts
from astro_dist.worker.stored_weights import StoredWeights
from astro_dist.worker.worker import Worker
from tests.support.models import files_of


@pytest.mark.parametrize("is_ahead", [True, False])
def test_weights_are_read_in_a_thread_of_their_own_with_the_same_bytes(run_config, tmp_path, monkeypatch, is_ahead):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain")))
    monkeypatch.setattr(block_runner, "reads_weights_ahead", lambda device_type: is_ahead)
    elsewhere, real = [], Checkpoint.read

    def read(self, names):
        if threading.current_thread() is not threading.main_thread():
            elsewhere.append(len(list(names)))
        return real(self, names)

    monkeypatch.setattr(Checkpoint, "read", read)
    pipeline.quantize(run_config())
    assert len(elsewhere) == 2 * is_ahead, "of three blocks the second and the third"
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


def test_a_wrong_guess_costs_nothing_but_a_read(run_config, tmp_path, monkeypatch):
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain")))
    monkeypatch.setattr(block_runner, "reads_weights_ahead", lambda device_type: True)
    real = Worker.solve_block
    monkeypatch.setattr(Worker, "solve_block", lambda self, call: real(self, SolveBlock(*call.place, following=0)))
    pipeline.quantize(run_config())
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


def test_mode_sequential_reads_the_next_block_while_the_last_stage_of_one_is_solved(run_config, tmp_path, monkeypatch):
    changes = {"execution__mode": "sequential"}
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain"), **changes))
    monkeypatch.setattr(block_runner, "reads_weights_ahead", lambda device_type: True)
    expected, taken, expect, of_source = [], [], StoredWeights.expect, StoredWeights.of_source

    def expecting(self, unit):
        expected.append(unit.index)
        expect(self, unit)

    def taking(self, unit):
        taken.append((unit.index, self._ahead.reading(unit.index) is not None))
        return of_source(self, unit)

    monkeypatch.setattr(StoredWeights, "expect", expecting)
    monkeypatch.setattr(StoredWeights, "of_source", taking)
    pipeline.quantize(run_config(**changes))
    assert set(expected) == {1, 2}
    assert [index for index, was_ahead in taken if was_ahead] == [1, 2]
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


def test_norm_and_head_stay_on_the_device_from_chunk_to_chunk(run_config, monkeypatch):
    reads, calls, outside, do = [], [], StoredWeights.outside, Worker.do
    monkeypatch.setattr(StoredWeights, "outside", lambda self: reads.append(len(calls)) or outside(self))
    monkeypatch.setattr(Worker, "do", lambda self, call: calls.append(call) or do(self, call))
    pipeline.quantize(run_config(calibration__token_weights="loss", calibration__chunk_samples=1))
    of_head = [number for number, call in enumerate(calls) if isinstance(call, DifferentiateLoss)]
    assert len(of_head) == 6
    assert [number for number in reads if of_head[0] <= number <= of_head[-1] + 1] == [of_head[0]]
    assert isinstance(calls[of_head[0] - 1], LoadWeights)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_waves_read_the_next_block_while_chunks_pass_with_the_same_bytes(run_config, tmp_path, monkeypatch, is_ahead):
    changes = {"calibration__token_weights": "loss", "calibration__chunk_samples": 1}
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain"), **changes))
    monkeypatch.setattr(block_runner, "reads_weights_ahead", lambda device_type: is_ahead)
    taken, calls, of_source, do = [], [], StoredWeights.of_source, Worker.do

    def taking(self, unit):
        if isinstance(calls[-1], LoadWeights):
            taken.append((unit.index, self._ahead.reading(unit.index) is not None))
        return of_source(self, unit)

    monkeypatch.setattr(StoredWeights, "of_source", taking)
    monkeypatch.setattr(Worker, "do", lambda self, call: calls.append(call) or do(self, call))
    pipeline.quantize(run_config(**changes))
    # The last block is read again: norm and head lay between.
    assert taken == [(0, False), (1, is_ahead), (2, is_ahead), (2, is_ahead), (1, is_ahead), (0, is_ahead)]
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


@pytest.mark.parametrize("is_ahead", [True, False])
def test_next_share_is_read_while_one_is_added_with_the_same_bytes(run_config, tmp_path, monkeypatch, is_ahead):
    changes = {"execution__mode": "sequential", "execution__hessian_shares": 2}
    pipeline.quantize(run_config(output__dir=str(tmp_path / "plain"), **changes))
    monkeypatch.setattr(share_merger, "reads_weights_ahead", lambda device_type: is_ahead)
    read, load = {True: [], False: []}, BlockInParts.load

    def loading(self, batch, part):
        if part.startswith("share"):
            read[threading.current_thread() is threading.main_thread()].append(part)
        return load(self, batch, part)

    monkeypatch.setattr(BlockInParts, "load", loading)
    pipeline.quantize(run_config(**changes))
    assert set(read[True]) == ({"share-0"} if is_ahead else {"share-0", "share-1"})
    assert set(read[False]) == ({"share-1"} if is_ahead else set())
    assert files_of(tmp_path / "run" / "model") == files_of(tmp_path / "plain" / "model")


def test_share_that_cannot_be_read_ahead_is_an_error_of_the_call_that_adds_it(run_config, monkeypatch):
    monkeypatch.setattr(share_merger, "reads_weights_ahead", lambda device_type: True)
    harmed, load = [], BlockInParts.load

    def loading(self, batch, part):
        if part == "share-1" and threading.current_thread() is not threading.main_thread() and not harmed:
            path = self._path(batch, part)
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
            harmed.append(path)
        return load(self, batch, part)

    monkeypatch.setattr(BlockInParts, "load", loading)
    summary = pipeline.quantize(run_config(execution__mode="sequential", execution__hessian_shares=2))
    assert [(retry.kind, retry.method) for retry in summary.retries] == [("damaged", "merge Hessians")]
