"""The memory that is free on a device: of a machine, of the container or job that the process lives in, or of a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_bytes"]

_SYSTEM = Path("/")


def available_bytes(device: torch.device, system: Path = _SYSTEM) -> int:
    """Return the memory of a device that is free, in bytes.

    Args:
        device: The device.
        system: Folder that holds `proc` and `sys`.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_of_machine(system), *_of_groups(system)])


def _of_machine(system: Path) -> int:
    path = system / "proc/meminfo"
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_groups(system: Path) -> Iterator[int]:
    """Yield what each control group of the process, version 2, leaves free: Kubernetes and Slurm set limits there."""
    path, root = system / "proc/self/cgroup", system / "sys/fs/cgroup"
    lines = path.read_text().splitlines() if path.is_file() else []
    group = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    for folder in (root / group, *(root / parent for parent in Path(group).parents)):
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the outermost group has no limit
            continue
        if limit.isdigit():
            # Pages of files that nobody used lately are given back before memory runs out.
            yield max(int(limit) - int(used) + int(statistics.get("inactive_file", 0)), 0)
