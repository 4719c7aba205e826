"""The least time that a run can take: operations that must be done over the machine's rate, bytes over its bandwidth.

    python tests/bench/floor.py MODEL [--set calibration.samples=32 --set quantization.group_size=64 ...] [--threads 2]
    python tests/bench/floor.py MODEL --device h100 --workers 8
    python tests/bench/floor.py --run RUN

MODEL is a folder with a config.json; weights need not be there. RUN is the directory of a finished run, whose phases
stand beside the floor. What is counted is what the method asks for, however the code does it: a symmetric product is
half a product, causal attention half the square, one factorization serves the regularizer and GPTQ, an elementwise
step is a few operations an element in one pass. Of a phase the larger of both times counts, as if computing and moving
overlapped; elementwise operations go at the rate of products, every file lies in memory, and nothing waits: no program
reaches it. Refinement is counted with all of its passes. Prints Markdown.
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
from astro.quantization.row_solver import num_sample_rows
from astro.storage.byte_store import FolderStore
from astro.storage.checkpoint import Checkpoint, TensorEntry
from astro_dist.config.schema import RunConfig
from astro_dist.config.yaml_file import load_config
from astro_dist.planning.checkpoint_plan import make_plan
from astro_dist.planning.devices import DEVICES, measure
from astro_dist.planning.predicted_groups import PredictedInputGroup, predicted_input_groups
from astro_dist.planning.units import Plan

_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_PROX_OPERATIONS = 20
"""An element of the proximal map: four Newton steps of a subtraction, a clamp, a comparison and a sum; the clip."""
_CANDIDATE_OPERATIONS = 7
"""An element for each scale that is tried: divide, round, clamp, multiply, subtract, square, sum with its weight."""
_ROUNDING_OPERATIONS = 6
_COPY_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Need:
    """What must be done: operations in the compute dtype, operations in float32, bytes between memory and processor,
    operations on factors that may be rounded to bfloat16.
    """

    compute: float = 0.0
    exact: float = 0.0
    moved_bytes: float = 0.0
    rounded: float = 0.0

    @property
    def operations(self) -> float:
        """All of them."""
        return self.compute + self.exact + self.rounded

    def __add__(self, other: "Need") -> "Need":
        return Need(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Need":
        return Need(*(value * times for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Machine:
    """All workers together: operations a second in the compute dtype, in float32, and in bfloat16 where that is faster;
    bytes a second of its memory.
    """

    name: str
    compute: float
    exact: float
    rounded: float
    bandwidth: float

    def seconds(self, need: Need) -> float:
        """The least time."""
        computing = need.compute / self.compute + need.exact / self.exact + need.rounded / self.rounded
        return max(computing, need.moved_bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the counts need of a model and of its calibration.

    Attributes:
        blocks: the groups of layers of each block.
        attention: width of all heads together; queries and keys are as wide as values.
        hidden: width of the hidden states.
        vocabulary: tokens that the model knows.
        tokens: for calibration.
        held_out: tokens that perplexity is measured on.
        length: tokens a sequence.
        itemsize: bytes of an element in the compute dtype.
        read_bytes: of the source.
        written_bytes: of the result.
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
    """Of a block: its linear layers, queries times keys and weights times values."""
    linear = 2.0 * sum(group.reach * group.rows * group.columns for group in groups)
    return tokens * (linear + 4.0 * attention * ((length + 1) / 2 if causal else length))


def solve_needs(columns: int, rows: float, settings: Quantization, regularization: Regularizer) -> dict[str, Need]:
    """Of some rows whose group is factored, by phase; the regularization of β = 0 is left out by who asks."""
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
    """Of a group of layers once its Hessian is there, by phase."""
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
    """What a run must do, by phase.

    Args:
        shape: of the model and its calibration.
        config: of the run.
        regularized: share of the weights for which a β other than 0 is chosen.
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
    """Plan and skeleton of a folder, from its headers, or where it has no weights from its config.json alone."""
    dtype = json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16")
    skeleton = Skeleton(folder, getattr(torch, dtype))
    if any(folder.glob("*.safetensors")):
        return make_plan(Checkpoint.open(folder), skeleton, quantization), skeleton
    name, itemsize = _DTYPES[dtype]
    shapes = {key: tuple(value.shape) for key, value in skeleton.model.named_parameters()}
    entries = {
        key: TensorEntry(key, "", name, shape, 0, itemsize * torch.Size(shape).numel()) for key, shape in shapes.items()
    }
    return make_plan(Checkpoint(FolderStore(folder), entries), skeleton, quantization), skeleton


def shape_of(folder: Path, config: RunConfig, itemsize: int) -> Shape:
    """Shape of a model folder under a configuration, `itemsize` the bytes of an element in the compute dtype."""
    plan, skeleton = plan_of(folder, config.quantization)
    own, calibration = skeleton.model.config.get_text_config(), config.calibration
    heads = own.num_attention_heads
    return Shape(
        blocks=[predicted_input_groups(unit.linears, plan.expert_share) for unit in plan.blocks],
        attention=heads * (getattr(own, "head_dim", None) or plan.hidden_size // heads),
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
    """The best of three measurements of the CPU at hand; what runs beside it makes it look slower."""
    found = [measure(threads, size=2048) for _ in range(3)]
    exact = max(device.float32 for device in found)
    rounded = max(exact, *(device.bfloat16 for device in found))
    compute = rounded if half else exact
    return Machine(f"this CPU, {threads} threads", compute, exact, rounded, max(bandwidth(threads) for _ in range(3)))


def bandwidth(threads: int) -> float:
    """Bytes a second that are read and written, of a copy larger than any cache."""
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
    """Several GPUs of a kind at what large products reach of their data sheet; float32 without TF32, or as three of
    bfloat16.
    """
    device = DEVICES[name]
    rounded = max(device.bfloat16, device.float32)
    exact = max(device.float32, rounded / 3)
    rates = (device.bfloat16 if half else device.float32, exact, rounded, 8 * device.elements)
    return Machine(f"{workers} × {name}", *(workers * rate for rate in rates))


def measured_phases(run: Path, summary: Mapping) -> tuple[dict[str, float], int]:
    """Wall seconds of a run's phases, as if all workers were always at work, and the number of its workers."""
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
    """Print phases, the longest floor first, then what is only measured, then the sum."""
    floors = {phase: machine.seconds(need) for phase, need in needs.items() if need != Need()}
    print(f"{machine.name}: {machine.compute / 1e9:.0f} GFLOP/s in the compute dtype, {machine.exact / 1e9:.0f} in "
          f"float32, {machine.rounded / 1e9:.0f} on rounded factors, {machine.bandwidth / 1e9:.0f} GB/s\n")  # fmt: skip
    print("| phase | operations | GB moved | floor s | measured s | ratio |\n|---|---|---|---|---|---|")
    for phase in [*sorted(floors, key=lambda phase: -floors[phase]), *(own for own in measured if own not in floors)]:
        need, floor = needs.get(phase, Need()), floors.get(phase, 0.0)
        print(_row(phase, need.operations, need.moved_bytes, floor, measured.get(phase)))
    total = sum(needs.values(), Need())
    print(_row("sum", total.operations, total.moved_bytes, sum(floors.values()),
               sum(measured.values()) if measured else None))  # fmt: skip


def _row(phase: str, operations: float, moved_bytes: float, floor: float, measured: float | None) -> str:
    seen = "" if measured is None else f"{measured:.2f}"
    ratio = f"{measured / floor:.1f}" if measured is not None and floor > 0 else ""
    return f"| {phase} | {operations:.2e} | {moved_bytes / 1e9:.2f} | {floor:.2f} | {seen} | {ratio} |"


def configured(path: Path | None, model: Path | None, assignments: Sequence[str]) -> RunConfig:
    """A run's configuration, or the defaults for a model, changed."""
    with tempfile.TemporaryDirectory() as scratch:
        defaults = Path(scratch) / "config.json"  # JSON is YAML
        defaults.write_text(json.dumps({"model": {"source": str(model)}, "output": {"dir": scratch}}))
        return load_config(path or defaults, list(assignments))


def itemsize_of(run: Path | None, device: str | None, dtype: str) -> int:
    """Bytes of an element in the compute dtype: what a run used, else what it would; CPUs take float32 for float16."""
    if run is not None:
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        dtype = next(line["compute_dtype"] for line in lines if line["event"] == "started").removeprefix("torch.")
    elif dtype == "float16" and device is None:
        dtype = "float32"
    return _DTYPES[dtype][1]


def main() -> None:
    """Count, measure the machine, print."""
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
        options.threads = workers * config.execution.threads_per_worker
        regularized = 1 - summary["betas"].get("0", 0) / sum(summary["betas"].values())
    folder = Path(config.model.source)
    dtype = json.loads((folder / "config.json").read_text()).get("dtype", "bfloat16")
    shape = shape_of(folder, config, itemsize_of(run, options.device, dtype))
    half = shape.itemsize == 2
    gpus = options.device and some_gpus(options.device, options.workers, half)
    print_table(count(shape, config, regularized), gpus or this_machine(options.threads, half), measured)
    steps = (1 + config.quantization.refine_passes) * sum(group.columns for own in shape.blocks for group in own)
    print(f"\nIn solve and refinement {steps / len(shape.blocks):,.0f} columns a block follow one another.")


if __name__ == "__main__":
    main()
