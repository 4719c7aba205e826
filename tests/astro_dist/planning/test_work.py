"""Work is counted apart from devices, and takes time on one."""

import pytest

from astro_dist.planning.devices import Device
from astro_dist.planning.work import Work

SLOW = Device("slow", 1e9, 4e9, 2e9, 1e-6, 10**9, 1e8)


def test_work_adds_up():
    assert Work(1, 2, 3, 4, 5, 6, 7) + Work(7, 6, 5, 4, 3, 2, 1) == Work(8, 8, 8, 8, 8, 8, 8)


def test_seconds_add_up():
    work = Work(compute=8e9, rounded=4e9, exact=1e9, elements=2e9, steps=1e6, moved_bytes=1e8)
    assert work.seconds(SLOW, half=True) == pytest.approx(2 + 1 + 1 + 1 + 1 + 1)
    assert work.seconds(SLOW, half=False) == pytest.approx(8 + 1 + 1 + 1 + 1 + 1)


@pytest.mark.parametrize(("behind_s", "took_s"), [(1, 8 + 2), (7, 8 + 2), (9, 9 + 2)])
def test_what_is_moved_behind_computing_counts_where_it_takes_longer(behind_s, took_s):
    behind = behind_s * 1e8
    work = Work(compute=8e9, moved_bytes=behind + 2e8, behind_bytes=behind)
    assert work.seconds(SLOW, half=False) == pytest.approx(took_s)
