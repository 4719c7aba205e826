"""How a run scales: the run's own schedule in simulated time, 1 to 512 workers, both modes, four large models.

    python tests/bench/scaling.py [--device h100] [--models 8B 70B ...]
    python tests/bench/scaling.py --measured RUN --workers 1 2

The first prints Markdown: wall time and efficiency by number of workers, and what limits. The second checks the
simulator: call times are taken from the journal and records of a real run instead, and its wall time is simulated for
some numbers of workers, to be held against real runs.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.model.linear_layer import LinearLayer
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_config
from astro_dist.planning.cost import CostModel
from astro_dist.planning.devices import DEVICES
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
from astro_dist.source.calibration_text import chunk_tokens

WORKERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
CONFIG = {
    "model": {"source": "none"},
    "calibration": {"samples": 128, "sequence_length": 2048, "chunk_samples": 2, "holdout_samples": 16},
    "output": {"dir": "none"},
}


def dense(hidden: int, intermediate: int, kv: int) -> list[tuple[str, int, int]]:
    """Name, rows and columns of the linear layers of a Llama block."""
    attention = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
    ]
    mlp = [("mlp.gate_proj", intermediate, hidden), ("mlp.up_proj", intermediate, hidden)]
    return [*attention, ("self_attn.o_proj", hidden, hidden), *mlp, ("mlp.down_proj", hidden, intermediate)]


def deepseek(block: int) -> list[tuple[str, int, int]]:
    """Of a block of DeepSeek-V3: 256 routed experts behind three dense blocks."""
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
    """A plan as headers of such a model would give."""
    num_blocks, hidden, vocabulary, layers = MODELS[name]
    blocks = []
    for index in range(num_blocks):
        linears = tuple(linear(f"layers.{index}.{n}", r, c) for n, r, c in layers(index))
        weights = sum(linear.rows * linear.columns for linear in linears)
        blocks.append(BlockUnit(index, (), linears, "", 2 * weights, int(0.53 * weights)))
    outside = 2 * vocabulary * hidden
    total = sum(linear.rows * linear.columns for unit in blocks for linear in unit.linears)
    copies = tuple(CopyUnit(index, (), "", outside) for index in range(2))
    return Plan(
        blocks=tuple(blocks),
        copies=copies,
        outside_weights=outside,
        hidden_size=hidden,
        vocab_size=vocabulary,
        weights=total,
        expert_share=8 / 256,
    )


def linear(name: str, rows: int, columns: int) -> LinearLayer:
    """A layer, of an expert where its name says so."""
    found = re.search(r"(.+\.experts)\.(\d+)\.(.+)", name)
    plain = LinearLayer.plain(name, f"{name}.weight", rows, columns)
    if found is None:
        return plain
    parameter = f"{found[1]}.{'down_proj' if found[3] == 'down_proj' else 'gate_up_proj'}"
    return dataclasses.replace(plain, parameter=parameter, expert=int(found[2]))


def table(name: str, device_name: str, gigabits: float) -> None:
    """Print one model's table."""
    plan, device = make_plan(name), dataclasses.replace(DEVICES[device_name], storage=gigabits / 8 * 1e9)
    print(f"\n{name} on {device_name}, 128 × 2048 tokens, {gigabits:g} Gbit/s a worker\n")
    print("| mode | | " + " | ".join(map(str, WORKERS)) + " |\n" + "|---" * (len(WORKERS) + 2) + "|")
    for mode in ("blocks", "sequential"):
        shares = {"hessian_shares": 8} if mode == "sequential" else {}
        config = RunConfig.model_validate({**CONFIG, "execution": {"mode": mode, **shares}})
        tokens = chunk_tokens(config.calibration)
        cost = CostModel(plan, config, tokens, 2, "cuda")
        walls, efficiencies, alone = [], [], 0.0
        for workers in WORKERS:
            schedule = schedule_of(config, len(plan.blocks), len(plan.copies), list(tokens))
            found = simulate(
                schedule, workers, lambda call, cost=cost: cost.work(call).seconds(device, True), cost.result
            )
            walls.append(f"{found.wall_s / 60:.1f}")
            alone = alone or found.wall_s
            efficiencies.append(f"{alone / workers / found.wall_s:.0%}")
        most = sorted(found.by_verb.items(), key=lambda item: -item[1])[:3]
        print(f"| {mode} | minutes | " + " | ".join(walls) + " |")
        print("| | efficiency | " + " | ".join(efficiencies) + " |")
        print(
            f"most time ({mode}): " + ", ".join(f"{method} {s / found.busy_s:.0%}" for method, s in most),
            file=sys.stderr,
        )


def measured(run: Path, workers: list[int]) -> None:
    """Simulate a run of mode `blocks` with its own call times."""
    config = load_config(run / "config.yaml")
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
                own = records[call.unit]["layers"][call.batch]["seconds"]
                apart = {MergeHessians: own.get("factor", 0.0), TryBetas: own.get("beta", 0.0)}
                return apart.get(type(call), sum(own.values()) - sum(apart.values()))
            case OpenBlock():
                return phases["read"]
            case Forward(chunk=chunk):
                own = 0.0 if is_held_out(chunk) else phases["hessian"] * tokens[chunk] / calibration
                return phases["forward"] * tokens[chunk] / total + own
        return sum(value for name, value in phases.items() if name not in ("read", "forward", "hessian"))

    def result(call: Call) -> Result:
        """Each input group is a batch, whose sample and rows are one tile each."""
        if not isinstance(call, SplitBlock):
            return None
        return BlockParts(tuple(BatchParts(batch, 1, 1) for batch in range(len(records[call.unit]["layers"]))))

    units = [path.stem for path in (run / "records").glob("*.json")]
    num_copies = sum(copy_index(unit) is not None for unit in units)
    for count in workers:
        found = simulate(schedule_of(config, len(records), num_copies, list(tokens)), count, seconds, result)
        print(f"{count} workers: simulated {found.wall_s:.0f} s, {found.efficiency(count):.0%} at work")
    print(f"the run itself: {max(line['time'] for line in lines) - min(began.values()):.0f} s after its first call")


def main() -> None:
    """Print tables, or check the simulator."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h100", choices=sorted(DEVICES))
    parser.add_argument("--gigabits", type=float, default=25, help="a second, from and to the shared folder, a worker")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.measured:
        measured(options.measured, options.workers)
        return
    for name in options.models:
        table(name, options.device, options.gigabits)


if __name__ == "__main__":
    main()
