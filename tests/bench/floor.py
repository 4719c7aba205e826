"""The least time of a run: operations that it must do over the machine's rate, and bytes over its bandwidth.

    python tests/bench/floor.py MODEL [--set calibration.samples=32 --set quantization.group_size=64 ...] [--threads 2]
    python tests/bench/floor.py MODEL --device h100 --workers 8
    python tests/bench/floor.py --run RUN

MODEL is a folder with a config.json; it needs no weights. RUN is the directory of a finished run, whose phases are
shown beside the least times. The script counts what the method asks for, however the code does it. A symmetric product
is half a product, and causal attention half the square. One factorization serves the regularizer and GPTQ. An
elementwise step is a few operations for each element, in one pass. Refinement has all of its passes.

No program can reach these times: computing and moving overlap, so that the longer of both counts for a phase;
elementwise operations are as fast as products; every file lies in memory; and nothing waits. The output is Markdown.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.config import Quantization, Regularizer
from astro.model.skeleton import Skeleton
from astro.quantization.beta_search import NUM_CANDIDATES
from astro.quantization.grid import num_candidates
from astro.quantization.sampled_rows import num_sample_rows
from astro.storage.byte_store import FolderStore
from astro.storage.checkpoint import Checkpoint
from astro.storage.shard_header import StoredTensor
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_recorded_config
from astro_dist.planning.checkpoint_plan import make_plan
from astro_dist.planning.devices import DEVICES, measure
from astro_dist.planning.predicted_groups import PredictedInputGroup, predicted_input_groups
from astro_dist.planning.units import Plan

_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_PROX_OPERATIONS = 20
"""The operations for an element of the proximal map: four Newton steps of four operations, and the clip."""
_CANDIDATE_OPERATIONS = 7
"""The operations for an element and each scale that is tried: divide, round, clamp, multiply, subtract, square, sum."""
_ROUNDING_OPERATIONS = 6
_COPY_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Need:
    """Says how much must be done.

    Attributes:
        compute: Number of operations in the compute dtype.
        exact: Number of operations in float32.
        moved_bytes: Number of bytes that move between memory and processor.
        rounded: Number of operations on factors that may be rounded to bfloat16.
    """

    compute: float = 0.0
    exact: float = 0.0
    moved_bytes: float = 0.0
    rounded: float = 0.0

    @property
    def operations(self) -> float:
        """Return the number of all operations."""
        return self.compute + self.exact + self.rounded

    def __add__(self, other: "Need") -> "Need":
        return Need(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Need":
        return Need(*(value * times for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """Says how fast all workers are together.

    Attributes:
        name: Description of the machine.
        compute: Operations per second in the compute dtype.
        exact: Operations per second in float32.
        rounded: Operations per second in bfloat16, or in float32 if that is faster.
        bandwidth: Bytes per second from and to memory.
    """

    name: str
    compute: float
    exact: float
    rounded: float
    bandwidth: float

    def seconds(self, need: Need) -> float:
        """Return the least time for what must be done, in seconds."""
        computing = need.compute / self.compute + need.exact / self.exact + need.rounded / self.rounded
        return max(computing, need.moved_bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Describes a model and its calibration, as far as the counts need it.

    Attributes:
        blocks: Input groups of each block.
        attention: Width of all heads together. Queries and keys are as wide as values.
        hidden: Width of the hidden states.
        vocabulary: Number of tokens that the model knows.
        tokens: Number of tokens to calibrate on.
        held_out: Number of tokens that perplexity is measured on.
        length: Number of tokens in a sequence.
        itemsize: Size of an element in the compute dtype, in bytes.
        read_bytes: Size of the source, in bytes.
        written_bytes: Size of the result, in bytes.
    """

    blocks: Sequence[Sequence[PredictedInputGroup]]
    attention: int
    hidden: int
    vocabulary: int
    tokens: int
    held_out: int
    length: int
    itemsize: int
    read_bytes: float
    written_bytes: float


def forward_operations(
    groups: Sequence[PredictedInputGroup], attention: int, tokens: int, length: int, causal: bool
) -> float:
    """Count the operations of a block: its linear layers, queries times keys, and weights times values."""
    linear = 2.0 * sum(group.reach * group.rows * group.columns for group in groups)
    return tokens * (linear + 4.0 * attention * ((length + 1) / 2 if causal else length))


def solve_needs(columns: int, rows: float, settings: Quantization, regularization: Regularizer) -> dict[str, Need]:
    """Count by phase what some rows of a factored group need. The caller leaves out the regularization of β = 0."""
    weights, product = rows * columns, 2.0 * rows * columns**2
    square, read, written = 4.0 * columns**2, 4.0 * weights, 5.0 * weights
    steps = regularization.steps if regularization.name != "none" else 0
    elementwise = num_candidates(settings.symmetric, settings) * _CANDIDATE_OPERATIONS * weights
    is_admm = regularization.solver == "admm"
    products = max(steps - 1, 0) * product if is_admm else steps * product
    clipped = Need(exact=steps * _PROX_OPERATIONS * weights, moved_bytes=square + 2 * read)
    needs = {
        "regularize": clipped + (Need(rounded=products) if is_admm else Need(exact=products)),
        "grid": Need(exact=elementwise, moved_bytes=read),
    }
    if settings.method == "gptq":
        needs["gptq"] = Need(
            exact=product / 2 + _ROUNDING_OPERATIONS * weights, moved_bytes=square / 2 + read + written
        )
        passes = settings.refine_passes
        rounding, moved = passes * 2 * _ROUNDING_OPERATIONS * weights, (square + read + written) * bool(passes)
        needs["refine"] = Need(exact=rounding, moved_bytes=moved, rounded=passes * product)
    return needs


def group_needs(group: PredictedInputGroup, settings: Quantization, regularization: Regularizer) -> dict[str, Need]:
    """Count by phase what an input group needs once its Hessian is there."""
    columns, gptq = group.columns, settings.method == "gptq"
    needs = solve_needs(columns, group.rows, settings, regularization)
    needs["factor"] = Need(exact=columns**3 / 3.0, moved_bytes=8.0 * columns**2) * gptq
    if regularization.is_searched:
        sampled = num_sample_rows(group.rows)
        weighed = solve_needs(columns, sampled * NUM_CANDIDATES, settings, regularization)
        weighed["regularize"] *= 1 - 1 / NUM_CANDIDATES
        weighed.pop("refine", None)
        needs["beta"] = sum(weighed.values(), Need())
    return needs


def count(shape: Shape, config: RunConfig, regularized: float = 1.0) -> dict[str, Need]:
    """Count by phase what a run must do.

    Args:
        shape: Shape of the model and of its calibration.
        config: Configuration of the run.
        regularized: Share of the weights for which a β other than 0 is chosen.
    """
    settings, sequential = config.quantization, config.execution.mode == "sequential"
    compensated = sequential and settings.compensates
    passing = 2.0 * shape.hidden * shape.itemsize  # bytes of a token that enters a block and leaves it
    total: dict[str, Need] = {"read": Need(moved_bytes=shape.read_bytes)}

    def add(phase: str, need: Need) -> None:
        total[phase] = total.get(phase, Need()) + need

    def forward(groups: Sequence[PredictedInputGroup], tokens: int) -> Need:
        weights = sum(group.rows * group.columns for group in groups) * shape.itemsize
        operations = forward_operations(groups, shape.attention, tokens, shape.length, causal=True)
        return Need(operations, 0.0, tokens * passing + weights)

    for groups in shape.blocks:
        streams = 1 + compensated  # the source's own activations beside those behind quantized layers
        add("forward", forward(groups, shape.tokens) * streams + forward(groups, shape.held_out))
        add("evaluate", forward(groups, shape.held_out) * bool(shape.held_out))
        for group in groups:
            inputs = group.reach * shape.tokens * group.columns
            symmetric = Need(inputs * group.columns, 0.0, inputs * shape.itemsize + 4.0 * group.columns**2)
            add("hessian", symmetric)
            if compensated:
                product = 4.0 * group.rows * group.columns**2  # W times the drift, and two triangular solves
                add("compensate", Need(inputs * 2 * group.columns, product, 4.0 * group.columns**2))
            for phase, need in group_needs(group, settings, config.regularizer).items():
                add(phase, need * regularized if phase == "regularize" else need)
    add("write", Need(moved_bytes=shape.written_bytes))
    rounds = config.execution.rounds
    needs = {phase: need * (1 if phase == "evaluate" else rounds) for phase, need in total.items()}
    matrix = shape.vocabulary * shape.hidden
    head = Need(2.0 * shape.held_out * matrix, 0.0, matrix * shape.itemsize) * bool(shape.held_out)
    return needs | {"head": head * (1 + rounds)}


def plan_of(folder: Path, quantization: Quantization) -> tuple[Plan, Skeleton]:
    """Return plan and skeleton of a folder, from its headers, or from its config.json alone if it has no weights."""
    dtype = json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16")
    skeleton = Skeleton(folder, getattr(torch, dtype))
    if any(folder.glob("*.safetensors")):
        return make_plan(Checkpoint.open(folder), skeleton, quantization), skeleton
    name = _DTYPES[dtype][0]
    shapes = {key: tuple(value.shape) for key, value in skeleton.model.named_parameters()}
    entries = {key: StoredTensor(key, "", name, shape, 0) for key, shape in shapes.items()}
    return make_plan(Checkpoint(FolderStore(folder), entries), skeleton, quantization), skeleton


def shape_of(folder: Path, config: RunConfig, itemsize: int) -> Shape:
    """Return the shape of a model folder under a configuration. `itemsize` is that of the compute dtype, in bytes."""
    plan, skeleton = plan_of(folder, config.quantization)
    model, calibration = skeleton.model.config.get_text_config(), config.calibration
    heads = model.num_attention_heads
    return Shape(
        blocks=[predicted_input_groups(unit.linears, plan.expert_share) for unit in plan.blocks],
        attention=heads * (getattr(model, "head_dim", None) or plan.hidden_size // heads),
        hidden=plan.hidden_size,
        vocabulary=plan.vocab_size,
        tokens=calibration.samples * calibration.sequence_length,
        held_out=calibration.holdout_samples * calibration.sequence_length,
        length=calibration.sequence_length,
        itemsize=itemsize,
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
    )


def this_machine(threads: int, half: bool) -> Machine:
    """Measure this CPU three times, and return the best. What else runs at the time makes it look slower."""
    devices = [measure(threads, size=2048) for _ in range(3)]
    exact = max(device.float32 for device in devices)
    rounded = max(exact, *(device.bfloat16 for device in devices))
    compute = rounded if half else exact
    return Machine(f"this CPU, {threads} threads", compute, exact, rounded, max(bandwidth(threads) for _ in range(3)))


def bandwidth(threads: int) -> float:
    """Measure how many bytes per second a copy reads and writes that is larger than any cache."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source, target = torch.zeros(_COPY_BYTES, dtype=torch.uint8), torch.zeros(_COPY_BYTES, dtype=torch.uint8)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        return 4 * 2 * _COPY_BYTES / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)


def some_gpus(name: str, workers: int, half: bool) -> Machine:
    """Return several GPUs of a kind, at the rates of large products.

    Float32 is as fast as without TF32, or as three products of bfloat16 if that is faster.
    """
    device = DEVICES[name]
    rounded = max(device.bfloat16, device.float32)
    exact = max(device.float32, rounded / 3)
    rates = (device.bfloat16 if half else device.float32, exact, rounded, 8 * device.elements)
    return Machine(f"{workers} × {name}", *(workers * rate for rate in rates))


def measured_phases(run: Path, summary: Mapping) -> tuple[dict[str, float], int]:
    """Return seconds of a run's phases, divided by the number of its workers, and that number."""
    workers = len(summary["peak_rss_bytes"]) - 1
    phases = dict(summary["phases_s"])
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    began = {line["unit"]: line["time"] for line in lines if line["event"] == "began"}
    for line in lines:
        phase = line.get("unit", "").split("-")[0]
        if line["event"] == "finished" and phase in ("embed", "head", "copy"):
            phases[phase] = phases.get(phase, 0.0) + line["time"] - began[line["unit"]]
    at_work = max(line["time"] for line in lines if line["event"] == "finished") - min(began.values())
    phases["idle, or in no phase"] = workers * at_work - sum(phases.values())
    phases["start and end"] = workers * (summary["wall_s"] - at_work)
    return {phase: seconds / workers for phase, seconds in phases.items()}, workers


def print_table(needs: Mapping[str, Need], machine: Machine, measured: Mapping[str, float]) -> None:
    """Print phases, the longest least time first, then those that are only measured, then the sum."""
    floors = {phase: machine.seconds(need) for phase, need in needs.items() if need != Need()}
    print(f"{machine.name}: {machine.compute / 1e9:.0f} GFLOP/s in the compute dtype, {machine.exact / 1e9:.0f} in "
          f"float32, {machine.rounded / 1e9:.0f} on rounded factors, {machine.bandwidth / 1e9:.0f} GB/s\n")  # fmt: skip
    print("| phase | operations | GB moved | floor s | measured s | ratio |\n|---|---|---|---|---|---|")
    for phase in [
        *sorted(floors, key=lambda phase: -floors[phase]),
        *(phase for phase in measured if phase not in floors),
    ]:
        need, floor = needs.get(phase, Need()), floors.get(phase, 0.0)
        print(_row(phase, need.operations, need.moved_bytes, floor, measured.get(phase)))
    total = sum(needs.values(), Need())
    print(_row("sum", total.operations, total.moved_bytes, sum(floors.values()),
               sum(measured.values()) if measured else None))  # fmt: skip


def _row(phase: str, operations: float, moved_bytes: float, floor: float, measured: float | None) -> str:
    cell = "" if measured is None else f"{measured:.2f}"
    ratio = f"{measured / floor:.1f}" if measured is not None and floor > 0 else ""
    return f"| {phase} | {operations:.2e} | {moved_bytes / 1e9:.2f} | {floor:.2f} | {cell} | {ratio} |"


def configured(path: Path | None, model: Path | None, assignments: Sequence[str]) -> RunConfig:
    """Return the configuration of a run, or the defaults for a model, with some changes."""
    with tempfile.TemporaryDirectory() as scratch:
        defaults = Path(scratch) / "config.json"  # JSON is YAML
        defaults.write_text(json.dumps({"model": {"source": str(model)}, "output": {"dir": scratch}}))
        return load_recorded_config(path or defaults, list(assignments))


def itemsize_of(run: Path | None, device: str | None, dtype: str) -> int:
    """Return the size of an element in bytes, in the dtype that a run used or would use. CPUs do not take float16."""
    if run is not None:
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        dtype = next(line["compute_dtype"] for line in lines if line["event"] == "started").removeprefix("torch.")
    elif dtype == "float16" and device is None:
        dtype = "float32"
    return _DTYPES[dtype][1]


def main() -> None:
    """Count, measure the machine, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="folder with config.json")
    parser.add_argument("--run", type=Path, help="directory of a finished run; its model is the configured one")
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all workers together")
    parser.add_argument("--device", choices=sorted(DEVICES), help="GPUs by their data sheet, not this machine")
    parser.add_argument("--workers", type=int, default=1, help="GPUs")
    options = parser.parse_args()
    if (options.run is None) == (options.model is None):
        parser.error("give either MODEL or --run RUN")
    run, measured, regularized = options.run, {}, 1.0
    config = configured(run and run / "config.yaml", options.model, options.assignments)
    if run:
        summary = json.loads((run / "summary.json").read_text())
        measured, workers = measured_phases(run, summary)
        options.threads = workers * config.execution.cpu_threads
        regularized = 1 - summary["betas"].get("0", 0) / sum(summary["betas"].values())
    folder = Path(config.model.source)
    dtype = json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16")
    shape = shape_of(folder, config, itemsize_of(run, options.device, dtype))
    half = shape.itemsize == 2
    gpus = options.device and some_gpus(options.device, options.workers, half)
    print_table(count(shape, config, regularized), gpus or this_machine(options.threads, half), measured)
    steps = (1 + config.quantization.refine_passes) * sum(group.columns for groups in shape.blocks for group in groups)
    print(f"\nIn solve and refinement {steps / len(shape.blocks):,.0f} columns a block follow one another.")


if __name__ == "__main__":
    main()
