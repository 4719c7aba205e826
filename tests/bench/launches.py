"""How many kernels the solve of a block launches on a GPU, and how often the host waits, by phase and by line.

    python tests/bench/launches.py [--shapes 70B] [--loops kernels|compiled|plain] [--host | --compile]

It runs the arithmetic of one input group on the CPU, with few rows and at three widths, and counts the operators that
are dispatched. An operator that only makes a view, or memory, launches nothing. How counts grow with the columns
follows from two widths and is checked at the third. Rows do not matter within a tile, and tiles are those of a GPU. A
sync is an operator that makes the host wait for a value.

The innermost loops run as on a GPU, or as `--loops` says. A kernel of ours counts as one launch, and so does what torch
compiles: as many as it makes of it for a CPU, two for a panel of refinement and else one. Every pass of refinement is
done. Not counted are the forward of the block, the copies to files, and the inversion of a matrix, which takes some
1,400 operators at the widest. The output is Markdown.

With `--host` it measures instead what it costs the host to launch, a column: on one row, so that hardly anything is
computed, by the clock of the process. Of kernels it leaves Triton's own launcher out. With `--compile` it measures how
long Triton takes on this CPU to compile the kernels for an H100: without what is kept of an earlier time, and with it.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.calibration.hessian import HessianAccumulator
from astro.calibration.starved_experts import InputStatistics
from astro.config import Quantization, Regularizer
from astro.formats import LAYOUTS
from astro.linalg import bf16_matmul, compiled, symmetric
from astro.linalg.cholesky import factorize
from astro.linalg.tiling import TILE_ELEMENTS, row_tiles
from astro.quantization import beta_search, column_ops, gptq, refine, regularizer
from astro.quantization.block import quantize_block
from astro.quantization.grid import QuantizedLinear, fit_grid
from astro.quantization.recipe import Recipe
from astro_dist.planning.devices import DEVICES

ROOT = Path(__file__).parents[2]
WIDTHS = (256, 512, 768)
ROWS = 128
"""The number of rows of a tile on a CPU, and of a tile of the sample."""
SHAPES = {
    "8B": {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)},
    "70B": {"q, k, v": (10240, 8192), "o": (8192, 8192), "gate, up": (57344, 8192), "down": (8192, 28672)},
    "405B": {"q, k, v": (18432, 16384), "o": (16384, 16384), "gate, up": (106496, 16384), "down": (16384, 53248)},
}
_MEMORY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::resize_")
_SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
_COPIES = ("tolist", "cpu", "numpy")
_LEAST_SHOWN = 0.15
_COMPILED = [(gptq, "_rounded_panel", 1), (refine, "_moved_panel", 2), (refine, "_scale_step", 1)]
_SOLVE = {
    "regularize": "regularize", "fit_grid": "grid", "require_finite_scales": "grid", "solve": "gptq",
    "refine": "refine", "compensate": "compensate",
}  # fmt: skip
"""The phases of a solve by the functions that `solve_rows` calls. Everything else that it calls computes figures."""
_PHASES = {
    "try_betas": "beta", "choose": "choose", "add_": "hessian", "finish_": "prepare", "prepare_input_groups": "prepare",
    "merge_rows": "merge and pack", "pack_linear": "merge and pack",
}  # fmt: skip
TIMES = {
    "hessian": "chunk", "beta": "sample tile", "prepare": "group", "choose": "group", "merge and pack": "group",
    "other": "group",
}  # fmt: skip
"""What a phase is done once for. The phases of a solve are done once for every tile."""


class Launches(TorchDispatchMode):
    """Counts operators by phase and by line of our code.

    Attributes:
        launches: Number of operators that start a kernel.
        syncs: Number of operators that make the host wait.
        inside_kernel: Whether the code that runs counts as a single kernel already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.syncs = Counter(), Counter()
        self.inside_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if self.inside_kernel:
            return func(*args, **(kwargs or {}))
        waits = name in _SYNCS or (name == "aten::index" and any(_is_mask(index) for index in args[1]))
        if waits or not (func.is_view or name in _MEMORY):
            key = _key()
            self.syncs[key] += waits
            self.launches[key] += name != "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu(counter: Launches) -> Iterator[None]:
    """Compute as on a GPU, where a product of two bfloat16 factors is a single kernel."""
    multiply = as_kernels(counter, bf16_matmul.product, 1)
    with (
        mock.patch.object(bf16_matmul, "_is_faster", return_value=True),
        mock.patch.object(refine, "column_ops", _OwnKernels(counter)),
        mock.patch.object(gptq, "column_ops", _OwnKernels(counter)),
        mock.patch.dict(symmetric._STRIP, cpu=symmetric._STRIP["cuda"]),
        mock.patch.object(refine, "product", multiply),
        mock.patch.object(regularizer, "product", multiply),
        mock.patch.object(regularizer, "invert_", as_kernels(counter, regularizer.invert_, 0)),  # type: ignore[attr-defined]
    ):
        yield


class _OwnKernels:
    """Our kernels without Triton, and without numbers: what they write is nearly what it was, and stays finite."""

    def __init__(self, counter: Launches) -> None:
        self.round_columns = as_kernels(counter, self._round_columns, 1)
        self.move_scale = as_kernels(counter, lambda V, E, E_rounded, G, HV, *rest: torch.zeros_like(HV), 1)
        self.move_columns = as_kernels(counter, lambda H, V, *rest: torch.zeros(V.shape), 1)

    @staticmethod
    def _round_columns(*arguments):
        _, _, W, _, _, _, E, Q, _, _ = arguments
        E.copy_(W).mul_(0.01)
        Q.fill_(1)


@contextmanager
def counted_kernels(counter: Launches) -> Iterator[None]:
    """Count compiled code by its kernels."""
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(compiled, "is_enabled", return_value=True))
        for module, name, kernels in _COMPILED:
            replacement = as_kernels(counter, getattr(module, name).__wrapped__, kernels)
            patched.enter_context(mock.patch.object(module, name, replacement))
        yield


def as_kernels(counter: Launches, function: Callable, kernels: int) -> Callable:
    """Return a function that does the same and counts as so many launches."""

    def call(*args):
        counter.launches[_key()] += kernels
        counter.inside_kernel = True
        try:
            return function(*args)
        finally:
            counter.inside_kernel = False

    return call


class HostCopies(TorchFunctionMode):
    """Counts copies of whole tensors to the host as syncs. On a CPU they are no operators."""

    def __init__(self, counter: Launches) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _COPIES:
            self._counter.syncs[_key()] += 1
        return func(*args, **(kwargs or {}))


def _key() -> tuple[str, str]:
    """The phase and the line of the operator that is called now."""
    frames = _frames()
    return _phase([function for _, function in frames]), frames[0][0]


def _phase(functions: list[str]) -> str:
    """The phase of an operator by the functions of ours that it was called in, the innermost first."""
    if "weigh" not in functions and "solve_rows" in functions:
        called = reversed(functions[: functions.index("solve_rows")])  # the outermost first
        return next((_SOLVE[name] for name in called if name in _SOLVE), "figures")
    return next((phase for function, phase in _PHASES.items() if function in functions), "other")


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _frames() -> list[tuple[str, str]]:
    """The line and the function of every frame of ours, the innermost first."""
    frames, frame, folder = [], sys._getframe(1), str(ROOT / "astro") + "/"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(folder):
            frames.append((f"{name.removeprefix(folder)}:{frame.f_lineno}", frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return frames or [("elsewhere", "")]


def run_group(columns: int, settings: Quantization, loops: compiled.ColumnLoops) -> Launches:
    """Count what is done for an input group, with one chunk, one tile and one tile of the sample."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, columns, generator=generator) * 0.02
    X = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    layout, counters = LAYOUTS["compressed-tensors"], []
    # The search may choose β = 0, where nothing is regularized: what follows the search is counted with a fixed β.
    for settings_of_beta in (Regularizer(), Regularizer(beta=1e-4)):
        sums = HessianAccumulator(columns, torch.device("cpu"))
        counter = Launches()
        kernels = counted_kernels(counter) if loops == "compiled" else nullcontext()
        compiled.use("kernels" if loops == "kernels" else "plain")
        with torch.no_grad(), counter, HostCopies(counter), as_on_a_gpu(counter), kernels:
            sums.add_(X.bfloat16())
            H = sums.finish_("layer")
            known = InputStatistics(("layer",), H, len(X), len(X), "none")
            schemes = {"layer": settings.scheme("layer", columns)}
            recipe = Recipe(settings, settings_of_beta, torch.bfloat16)
            layers, _ = quantize_block({"layer": W}, [["layer"]], [known], schemes, recipe)
            layout.pack_linear("layer", layers["layer"], torch.bfloat16)
        counters.append(counter)
    searched, fixed = counters
    for which in ("launches", "syncs"):
        search = {key: n for key, n in getattr(searched, which).items() if key[0] in ("beta", "choose")}
        getattr(fixed, which).update(search)
    return fixed


def by_phase(counts: Counter) -> Counter:
    """Add up counts over all lines."""
    total: Counter = Counter()
    for (phase, _), number in counts.items():
        total[phase] += number
    return total


class Lines:
    """Holds counts that grow with the columns, each as a constant and a slope."""

    def __init__(self, narrow: Counter, wide: Counter, widest: Counter) -> None:
        step, self.slopes, self.fixed = WIDTHS[1] - WIDTHS[0], {}, {}
        for key in {**narrow, **wide}:
            self.slopes[key] = (wide[key] - narrow[key]) / step
            self.fixed[key] = narrow[key] - self.slopes[key] * WIDTHS[0]
            expected = self.fixed[key] + self.slopes[key] * WIDTHS[2]
            # The choice of β looks at one value more where it is not 0.
            assert abs(expected - widest[key]) <= 1, f"{key} does not grow evenly: {expected} and {widest[key]}"

    def at(self, key: object, columns: int) -> float:
        """Return the count for some width."""
        return self.fixed.get(key, 0.0) + self.slopes.get(key, 0.0) * columns


def times(phase: str, rows: int, columns: int, chunks: int) -> int:
    """Return how often a phase is done for an input group."""
    of = TIMES.get(phase, "tile")
    tiles = {"tile": row_tiles, "sample tile": beta_search.sample_tiles}.get(of)
    return len(tiles(rows, columns, TILE_ELEMENTS["cuda"])) if tiles else chunks if of == "chunk" else 1


def host_times(loops: compiled.ColumnLoops) -> tuple[float, float]:
    """Return the microseconds of the host for a column of GPTQ, and for one of a pass of refinement."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # memory that a kernel would fill may hold anything
    columns, passes = 512, 8
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3 * columns, columns, generator=generator)
    H, W = (X.T @ X / len(X))[None], torch.randn(1, 1, columns, generator=generator)
    factor = factorize(H, gptq.activation_order(H), 0.01, 1.0, ["host"])
    settings = Quantization(group_size=128, refine_tolerance=0.0)
    grid = fit_grid(W, settings.scheme("host", columns), settings, torch.bfloat16, factor.cost)
    quantized = QuantizedLinear(gptq.solve(W, factor, grid), grid)
    damping = factor.damping.float() * H.diagonal(dim1=-2, dim2=-1).mean(-1)

    def refined(num_passes: int) -> None:
        each = dataclasses.replace(settings, refine_passes=num_passes)
        refine.refine(W, quantized, H, damping, each, torch.bfloat16)

    compiled.use(loops)
    with mock.patch.object(column_ops, "_launch", return_value=None) if loops == "kernels" else nullcontext():
        actions = (lambda: gptq.solve(W, factor, grid), lambda: refined(passes), lambda: refined(0))
        solving, all_passes, none = map(_least_s, actions)
    compiled.use("plain")
    return solving / columns * 1e6, (all_passes - none) / passes / columns * 1e6


def compile_times(rounds: int = 3) -> dict[str, list[float]]:
    """Return the seconds in which a process compiles all kernels, each time with an empty cache and then with it."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compiled_kernels"]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            for seconds in found.values():
                done = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
                seconds.append(sum(json.loads(done.stdout.splitlines()[-1]).values()))
    return found


def _least_s(action: Callable[[], object], times: int = 25) -> float:
    """Return the least of several measurements, in seconds of the process."""
    action()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    """Count, extrapolate, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="70B", choices=list(SHAPES))
    parser.add_argument("--chunks", type=int, default=64, help="of calibration text")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--loops", default="kernels", choices=["kernels", "compiled", "plain"])
    parser.add_argument("--host", action="store_true", help="measure the host instead of counting")
    parser.add_argument("--compile", action="store_true", help="measure the compiler instead of counting")
    options = parser.parse_args()
    if options.compile and importlib.util.find_spec("triton") is None:
        parser.error("--compile: Triton is not here; pip install triton")
    if options.compile:
        for cache, seconds in compile_times().items():
            print(f"{cache}: {min(seconds):.2f} to {max(seconds):.2f} s for all kernels, compiled for an H100")
        return
    if options.host:
        solving, refining = host_times(options.loops)
        print(f"{options.loops}: {solving:.1f} µs a column of GPTQ, {refining:.1f} of a pass of refinement")
        return
    torch.set_num_threads(1)
    settings = Quantization(group_size=options.group_size, refine_tolerance=0.0)
    counters = [run_group(columns, settings, options.loops) for columns in WIDTHS]
    launches, syncs = (
        Lines(*(by_phase(getattr(counter, which)) for counter in counters)) for which in ("launches", "syncs")
    )
    groups = SHAPES[options.shapes]
    print(f"A block of {options.shapes}, group {options.group_size}, {settings.refine_passes} refinement passes, "
          f"{options.chunks} chunks, loops {options.loops}\n")  # fmt: skip
    print("| phase | of a | launches: fixed | a column | syncs | launches a block | syncs a block |")
    print("|---|---|---|---|---|---|---|")
    sums = [0.0, 0.0]
    for phase in launches.fixed:
        whole = [
            sum(lines.at(phase, c) * times(phase, r, c, options.chunks) for r, c in groups.values())
            for lines in (launches, syncs)
        ]
        sums = [a + b for a, b in zip(sums, whole, strict=True)]
        print(f"| {phase} | {TIMES.get(phase, 'tile')} | {launches.fixed[phase]:.0f} | {launches.slopes[phase]:.2f} | "
              f"{syncs.at(phase, WIDTHS[0]):.0f} | {whole[0]:,.0f} | {whole[1]:,.0f} |")  # fmt: skip
    print(f"| sum | | | | | {sums[0]:,.0f} | {sums[1]:,.0f} |\n")
    print_lines("syncs", Lines(*(counter.syncs for counter in counters)), WIDTHS[0], 1.0)
    print_lines("launches a column", Lines(*(counter.launches for counter in counters)), None, _LEAST_SHOWN)
    step_s = DEVICES["h100"].step_s
    print(f"At {step_s * 1e6:g} µs a launch, as `plan` takes it: {sums[0] * step_s:.1f} s a block.")


def print_lines(title: str, lines: Lines, columns: int | None, least: float) -> None:
    """Print the lines with the highest counts, at some width or for each column. They include the search of β."""
    print(f"| phase | line | {title} |\n|---|---|---|")
    counts = lines.slopes if columns is None else {key: lines.at(key, columns) for key in lines.fixed}
    for (phase, line), number in sorted(counts.items(), key=lambda item: -item[1]):
        if number >= least and phase != "beta":
            print(f"| {phase} | {line} | {number:.2f} |")
    print()


if __name__ == "__main__":
    main()
