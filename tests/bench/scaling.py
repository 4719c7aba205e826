"""How a run scales: its schedule in simulated time, with 1 to 512 workers, in all modes, on four large models.

    python tests/bench/scaling.py [--device h100] [--models 8B 70B ...]
    python tests/bench/scaling.py --measured RUN --workers 1 2

The first command prints wall time, efficiency, what the run directory holds at most and what is read and written by
number of workers, in Markdown, and what takes most of the time of one worker.
The second checks the simulator. It takes the times of calls from the journal and the records of a real run, and
simulates its wall time for some numbers of workers, which can be compared with real runs.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.model.linear_layer import LinearLayer
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.planning.cost import CostModel
from astro_dist.planning.coverage import Coverage
from astro_dist.planning.devices import DEVICES
from astro_dist.planning.disk_size import DiskSize
from astro_dist.planning.planned_run import PlannedRun
from astro_dist.planning.simulate import simulate
from astro_dist.planning.units import BlockUnit, CopyUnit, Plan
from astro_dist.schedule.calls import (
    BatchParts,
    BlockParts,
    Call,
    FinishEvaluation,
    Forward,
    MergeHessians,
    OpenBlock,
    Result,
    SolveRows,
    SplitBlock,
    TryBetas,
    WriteBlock,
)
from astro_dist.schedule.factory import schedule_of
from astro_dist.schedule.names import copy_index, is_held_out
from astro_dist.schedule.schedule import RunShape
from astro_dist.source.calibration_text import chunk_tokens

WORKERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
CONFIG = {
    "model": {"source": "none"},
    "calibration": {"samples": 128, "sequence_length": 2048, "chunk_samples": 2, "holdout_samples": 16},
    "output": {"dir": "none"},
}


def dense(hidden: int, intermediate: int, kv: int) -> list[tuple[str, int, int]]:
    """Return name, rows and columns of each linear layer of a Llama block."""
    attention = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
    ]
    mlp = [("mlp.gate_proj", intermediate, hidden), ("mlp.up_proj", intermediate, hidden)]
    return [*attention, ("self_attn.o_proj", hidden, hidden), *mlp, ("mlp.down_proj", hidden, intermediate)]


def deepseek(block: int) -> list[tuple[str, int, int]]:
    """Return the same for a block of DeepSeek-V3, which has 256 routed experts after three dense blocks."""
    layers = [
        ("self_attn.q_a_proj", 1536, 7168), ("self_attn.q_b_proj", 24576, 1536), ("self_attn.kv_a_proj", 576, 7168),
        ("self_attn.kv_b_proj", 32768, 512), ("self_attn.o_proj", 7168, 16384),
    ]  # fmt: skip
    mlps = ["mlp"] if block < 3 else ["mlp.shared", *(f"mlp.experts.{i}" for i in range(256))]
    width = 18432 if block < 3 else 2048
    for mlp in mlps:
        layers += [
            (f"{mlp}.gate_proj", width, 7168),
            (f"{mlp}.up_proj", width, 7168),
            (f"{mlp}.down_proj", 7168, width),
        ]
    return layers


MODELS = {
    "8B": (32, 4096, 128256, lambda block: dense(4096, 14336, 1024)),
    "70B": (80, 8192, 128256, lambda block: dense(8192, 28672, 1024)),
    "405B": (126, 16384, 128256, lambda block: dense(16384, 53248, 1024)),
    "671B MoE": (61, 7168, 129280, deepseek),
}


def make_plan(name: str) -> Plan:
    """Return the plan that the headers of such a model would give."""
    num_blocks, hidden, vocabulary, layers = MODELS[name]
    blocks = []
    for index in range(num_blocks):
        linears = tuple(linear(f"layers.{index}.{n}", r, c) for n, r, c in layers(index))
        weights = sum(linear.rows * linear.columns for linear in linears)
        blocks.append(BlockUnit(index, (), linears, "", 2 * weights, 2 * weights, int(0.53 * weights)))
    outside = 2 * vocabulary * hidden
    total = sum(linear.rows * linear.columns for unit in blocks for linear in unit.linears)
    copies = tuple(CopyUnit(index, (), "", outside, outside) for index in range(2))
    return Plan(
        blocks=tuple(blocks),
        copies=copies,
        outside_weights=outside,
        hidden_size=hidden,
        vocab_size=vocabulary,
        weights=total,
        coverage=Coverage(total, total, {}, {}),
        expert_share=8 / 256,
    )


def linear(name: str, rows: int, columns: int) -> LinearLayer:
    """Return a layer, which belongs to an expert if its name says so."""
    match = re.search(r"(.+\.experts)\.(\d+)\.(.+)", name)
    plain = LinearLayer.plain(name, f"{name}.weight", rows, columns)
    if match is None:
        return plain
    parameter = f"{match[1]}.{'down_proj' if match[3] == 'down_proj' else 'gate_up_proj'}"
    return dataclasses.replace(plain, parameter=parameter, expert=int(match[2]))


def table(name: str, device_name: str, gigabits: float, tune_steps: int) -> None:
    """Print the table of one model."""
    plan, device = make_plan(name), dataclasses.replace(DEVICES[device_name], storage=gigabits / 8 * 1e9)
    print(f"\n{name} on {device_name}, 128 × 2048 tokens, {gigabits:g} Gbit/s a worker\n")
    print("| mode | | " + " | ".join(map(str, WORKERS)) + " |\n" + "|---" * (len(WORKERS) + 2) + "|")
    for mode in ("blocks", "stages", "sequential"):
        sections = {"execution": {"mode": mode}, "quantization": {"tune_steps": tune_steps}}
        config = RunConfig.model_validate({**CONFIG, **sections})
        tokens = chunk_tokens(config.calibration)
        planned = PlannedRun(plan, config, tokens, torch.bfloat16, "cuda")
        cost, disk = CostModel(planned), DiskSize(planned)
        runs, efficiencies, disks, traffic = [], [], [], []
        for workers in WORKERS:
            schedule = schedule_of(config, RunShape(len(plan.blocks), len(plan.copies), list(tokens)))
            moved = []

            def seconds(call: Call, cost: CostModel = cost, moved: list[float] = moved) -> float:
                work = cost.work(call)
                moved.append(work.moved_bytes)
                return work.seconds(device, True)

            runs.append(simulate(schedule, workers, seconds, cost.result))
            efficiencies.append(f"{runs[0].wall_s / workers / runs[-1].wall_s:.0%}")
            disks.append(f"{disk.most_bytes(workers) / 1e9:.0f}")
            traffic.append(f"{sum(moved) / 1e9:.0f}")
        alone = runs[0]
        most = sorted(alone.by_verb.items(), key=lambda item: -item[1])[:3]
        print(f"| {mode} | minutes | " + " | ".join(f"{run.wall_s / 60:.1f}" for run in runs) + " |")
        print("| | efficiency | " + " | ".join(efficiencies) + " |")
        print("| | peak disk, GB | " + " | ".join(disks) + " |")
        print("| | read and written, GB | " + " | ".join(traffic) + " |")
        print(
            f"most time of one worker ({mode}): "
            + ", ".join(f"{verb} {took / alone.busy_s:.0%}" for verb, took in most),
            file=sys.stderr,
        )


def measured(run: Path, workers: list[int]) -> None:
    """Simulate a run of mode `blocks` with the times of its calls."""
    config = load_recorded_config(run / "config.yaml")
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    began = {line["unit"]: line["time"] for line in lines if line["event"] == "began"}
    took = {line["unit"]: line["time"] - began[line["unit"]] for line in lines if line["event"] == "finished"}
    records = {path.stem: json.loads(path.read_text())["result"] for path in (run / "records").glob("round-0-*.json")}
    tokens = chunk_tokens(config.calibration)
    total = sum(tokens.values())
    calibration = sum(n for chunk, n in tokens.items() if not is_held_out(chunk))

    held_out = sum(n for chunk, n in tokens.items() if is_held_out(chunk))

    def seconds(call: Call) -> float:
        if isinstance(call, Forward) and call.evaluates:
            return took[call.unit] * tokens[call.chunk] / held_out
        if isinstance(call, FinishEvaluation) or (isinstance(call, OpenBlock) and call.evaluates):
            return 0.0
        if call.unit not in records:
            return took[call.unit]
        phases = records[call.unit]["seconds"]
        match call:
            case SplitBlock() | WriteBlock():
                return phases["write"]
            case MergeHessians() | TryBetas() | SolveRows():
                phase_seconds = records[call.unit]["layers"][call.batch]["seconds"]
                apart = {MergeHessians: phase_seconds.get("factor", 0.0), TryBetas: phase_seconds.get("beta", 0.0)}
                return apart.get(type(call), sum(phase_seconds.values()) - sum(apart.values()))
            case OpenBlock():
                return phases["read"]
            case Forward(chunk=chunk):
                hessian = 0.0 if is_held_out(chunk) else phases["hessian"] * tokens[chunk] / calibration
                return phases["forward"] * tokens[chunk] / total + hessian
        return sum(value for name, value in phases.items() if name not in ("read", "forward", "hessian"))

    def result(call: Call) -> Result:
        """Return a batch for each input group, whose sample and rows are one tile each."""
        if not isinstance(call, SplitBlock):
            return None
        return BlockParts(tuple(BatchParts(batch, 1, 1) for batch in range(len(records[call.unit]["layers"]))))

    units = [path.stem for path in (run / "records").glob("*.json")]
    num_copies = sum(copy_index(unit) is not None for unit in units)
    for count in workers:
        schedule = schedule_of(config, RunShape(len(records), num_copies, list(tokens)))
        simulated = simulate(schedule, count, seconds, result)
        print(f"{count} workers: simulated {simulated.wall_s:.0f} s, {simulated.efficiency(count):.0%} at work")
    print(f"the run itself: {max(line['time'] for line in lines) - min(began.values()):.0f} s after its first call")


def main() -> None:
    """Print tables, or check the simulator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--gigabits", type=float, default=25, help="a second, from and to the shared folder, a worker")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tune-steps", type=int, default=0, help="quantization.tune_steps")
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.measured:
        measured(options.measured, options.workers)
        return
    for name in options.models:
        table(name, options.device, options.gigabits, options.tune_steps)


if __name__ == "__main__":
    main()
