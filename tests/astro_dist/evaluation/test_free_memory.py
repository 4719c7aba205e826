"""Free memory is that of the machine, or what the limits of a container or job leave."""

import pytest
import torch

from astro_dist.evaluation.free_memory import available_bytes


def write_group(folder, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


@pytest.mark.parametrize(
    ("inner", "outer", "free"),
    [
        ((1000, 900, 50), ("max", 10, 0), 150),
        (("max", 1, 0), (2000, 1500, 0), 500),
        (("max", 1, 0), ("max", 1, 0), 4096),
    ],
    ids=["container", "job", "machine"],
)
def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path, inner, outer, free):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 4 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    write_group(tmp_path / "sys/fs/cgroup/job", *outer)
    write_group(tmp_path / "sys/fs/cgroup/job/step", *inner)
    assert available_bytes(torch.device("cpu"), tmp_path) == free


def test_free_memory_of_this_machine_is_something():
    assert available_bytes(torch.device("cpu")) > 0
