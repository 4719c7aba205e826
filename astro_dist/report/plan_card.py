"""What `plan` shows: a few lines about the whole run, and a table of its units for those who ask."""

import itertools

from rich.filesize import decimal
from rich.table import Table

from astro_dist.console import compact_table, in_words
from astro_dist.planning.estimate import Estimate
from astro_dist.planning.units import BlockUnit, Plan
from astro_dist.planning.validate import Prepared
from astro_dist.report.command_output import coverage_lines, settings_line
from astro_dist.schedule.unit_words import UnitWords
from astro_dist.wording import percent, sentence

__all__ = ["plan_card", "plan_table"]

_LONG_S = 6 * 3600.0
"""Seconds from which a run on a CPU is so long that GPUs are pointed at."""


def plan_card(prepared: Prepared, needed: Estimate) -> list[str]:
    """Describe what a run will be and need.

    Args:
        prepared: The run, after all checks.
        needed: Memory, disk, traffic and time that it needs.
    """
    plan, is_gpu = prepared.plan, needed.device != "cpu"
    corrections = prepared.corrections
    written = plan.written_bytes + corrections.size_bytes
    most = "at most " if prepared.config.reconstruction.rank == "auto" else ""
    corrected = ", corrections included" if corrections.num_layers else ""
    origin = "projected, never measured on a GPU" if is_gpu else "from the speed of this machine"
    device = needed.device.upper() if is_gpu else "CPU worker" if needed.workers == 1 else "CPU workers"
    host = f", {decimal(needed.host_bytes)} of its host's" if is_gpu else ""
    limit = prepared.tensor_parallel.in_words
    lines = [
        settings_line(prepared.config),
        f"{_count(plan.weights)} weights quantized: {decimal(plan.read_bytes)} → {most}{decimal(written)} "
        f"({percent(written / plan.read_bytes)} of the source{corrected})",
        f"{needed.workers} × {device}: about {in_words(needed.wall_s)} once workers are up, {origin}; "
        f"{needed.device_hours:.2g} device-hours, {percent(needed.efficiency)} of that at work",
        f"{decimal(int(needed.worker_bytes))} of memory a {'GPU' if is_gpu else 'worker'}{host} · "
        f"{decimal(int(needed.disk_bytes))} of disk · {decimal(int(needed.moved_bytes))} read and written by workers",
        *coverage_lines(plan.coverage),
        sentence(limit),
        *(f"note: {note}" for note in prepared.notes),
    ]
    if needed.workers_at_once < needed.workers:
        lines.append(
            f"note: {needed.workers} workers on this machine are no faster than {needed.workers_at_once}, for which it "
            "has cores"
        )
    if not is_gpu and needed.wall_s > _LONG_S:
        lines.append("note: this is the time on this CPU; `--device h100` and the like foretell it for GPUs")
    return lines


def plan_table(plan: Plan) -> Table:
    """Make the table of a run's units. Blocks of one size that follow each other share a row.

    Args:
        plan: Units of the run.
    """
    table = compact_table()
    table.add_column("unit")
    for title in ("layers\neach", "read\neach", "written\neach"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("file, .safetensors", overflow="fold")
    words = UnitWords(len(plan.blocks))
    for unit in plan.copies:
        table.add_row(
            words.unit(unit.name), "-", decimal(unit.read_bytes), decimal(unit.written_bytes), _stem(unit.file)
        )
    for (layers, read_bytes, written_bytes), equal in itertools.groupby(plan.blocks, _size):
        blocks = list(equal)
        ends = blocks if len(blocks) == 1 else (blocks[0], blocks[-1])
        numbers = " to ".join(str(block.index + 1) for block in ends)
        files = "\nto ".join(_stem(block.file) for block in ends)
        names = f"{'block' if len(blocks) == 1 else 'blocks'} {numbers}"
        table.add_row(names, str(layers), decimal(read_bytes), decimal(written_bytes), files)
    return table


def _stem(file: str) -> str:
    return file.removesuffix(".safetensors")


def _count(number: int) -> str:
    """A large number in the unit that model sizes are given in."""
    for unit, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(block: BlockUnit) -> tuple[int, int, int]:
    return len(block.linears), block.read_bytes, block.written_bytes
