"""What is tried again, how often, and after which wait."""

from pathlib import Path

import pytest

from astro.errors import ConfigError, DamagedError, MemoryShortage, NumericalError, RunError, StorageError
from astro_dist.execution.failure import Failure, FailureHistory, kind_of
from astro_dist.schedule.calls import Forward, SolveRows
from astro_dist.schedule.unit_words import UnitWords

TILE = [SolveRows(0, 0, 1, tile) for tile in range(8)]
FORWARD = [Forward(0, 3, f"c{number:04d}") for number in range(8)]
LOST = RunError("the worker died")


def judge(history, call, error, lost=False):
    kind = kind_of(error, lost)
    return history.judge(Failure(call.unit, UnitWords(3).unit(call.unit), call.verb, 5, kind, str(error)), call, error)


def test_node_that_takes_many_workers_with_it_counts_once_for_each_of_their_calls():
    history = FailureHistory(max_retries=1)
    for call in TILE:
        assert judge(history, call, LOST, lost=True) == 0
    with pytest.raises(
        RunError,
        match=r"block 1 of 3, solve rows on worker 5: the worker died. Attempt 2 of 2 .*wants more memory",
    ):
        judge(history, TILE[3], LOST, lost=True)


def test_block_in_one_workers_hands_counts_as_one_whatever_chunk_it_died_at():
    history = FailureHistory(max_retries=2)
    for call in FORWARD[:2]:
        judge(history, call, LOST, lost=True)
    with pytest.raises(RunError, match="Attempt 3 of 3"):
        judge(history, FORWARD[2], LOST, lost=True)


def test_damaged_files_count_for_themselves():
    history = FailureHistory(max_retries=1)
    for name in "abcd":
        judge(history, FORWARD[0], DamagedError(Path(name), "its checksum is wrong"))
    with pytest.raises(RunError, match="the storage of the run directory returns other bytes than were written"):
        judge(history, FORWARD[1], DamagedError(Path("a"), "its checksum is wrong"))


def test_memory_that_is_too_little_is_not_tried_again_and_again():
    history = FailureHistory(max_retries=9)
    error = MemoryShortage("host: out of memory at solve of block 4: 13.5 GiB more were wanted")
    assert kind_of(error, lost=False) == "memory"
    assert judge(history, FORWARD[0], error) == 0
    with pytest.raises(RunError, match=r"Attempt 2 of 2 .*; lower calibration.chunk_samples, or set it to auto"):
        judge(history, FORWARD[1], error)


def test_full_disk_is_waited_for_ever_longer_and_the_advice_is_given_once():
    history = FailureHistory(max_retries=3)
    error = StorageError("shard: cannot be written: disk full. What is finished is kept")
    assert [judge(history, TILE[0], error) for _ in range(3)] == [15, 60, 240]
    with pytest.raises(RunError) as caught:
        judge(history, TILE[0], error)
    assert str(caught.value).count("What is finished is kept") == 1


@pytest.mark.parametrize("error", [TypeError("no"), ValueError("not enough values to unpack"), KeyError("x")])
def test_wrong_code_is_not_tried_again_and_no_device_is_blamed(error):
    with pytest.raises(
        RunError, match="a defect in the code of astro-dist or of the model, .* not tried again"
    ) as caught:
        judge(FailureHistory(max_retries=9), TILE[0], error)
    assert "cluster" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), OSError("stale handle"), MemoryError(), LOST])
def test_what_may_be_a_matter_of_one_device_is_tried_again(error):
    assert judge(FailureHistory(max_retries=1), TILE[0], error) == 0


@pytest.mark.parametrize(("error", "kind"), [(NumericalError("nan"), NumericalError), (ConfigError("key"), RunError)])
def test_what_would_be_the_same_anywhere_is_final(error, kind):
    with pytest.raises(kind):
        judge(FailureHistory(max_retries=9), TILE[0], error)
