"""What the solve of a block asks of a GPU's queue: kernel launches and host syncs by phase, and by line.

    python tests/bench/launches.py [--shapes 70B] [--plain]

Runs the arithmetic of one group of layers on the CPU with few rows, at three widths, and counts the operators that are
dispatched: one that only makes a view, or memory, launches nothing. What grows with the columns is found from two
widths and checked at the third; rows do not matter within a tile, and tiles are those of a GPU. A sync is an operator
that makes the host wait for a value. What a GPU's worker compiles counts as the kernels that torch makes of it for a
CPU: one each, two of a panel of refinement; `--plain` counts it uncompiled. Every refinement pass is done. The block's
own forward is not counted, nor the copies to files, nor what inverts a matrix, some 1,400 operators at the widest.
Prints Markdown.
"""

import argparse
import sys
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
from astro.linalg.tiling import row_tiles
from astro.quantization import beta_search, gptq, refine, regularizer
from astro.quantization.block import quantize_block
from astro.quantization.row_solver import Recipe
from astro_dist.planning.devices import DEVICES

ROOT = Path(__file__).parents[2]
WIDTHS = (256, 512, 768)
ROWS = 128
"""One tile on a CPU, and one of the sample."""
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
"""Phases of a solve by the functions that `solve_rows` calls; all else it calls are figures."""
_PHASES = {
    "try_betas": "beta", "choose": "choose", "add_": "hessian", "finish_": "prepare", "prepare_input_groups": "prepare",
    "merge_rows": "merge and pack", "pack_linear": "merge and pack",
}  # fmt: skip
TIMES = {
    "hessian": "chunk", "beta": "sample tile", "prepare": "group", "choose": "group", "merge and pack": "group",
    "other": "group",
}  # fmt: skip
"""What a phase is done once for; those of a solve for every tile."""


class Launches(TorchDispatchMode):
    """Counts operators by phase and line of ours.

    Attributes:
        launches: all that start a kernel.
        syncs: that make the host wait.
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
    """Take products of halves, which are a kernel each there."""
    multiply = as_kernels(counter, bf16_matmul.product, 1)
    with (
        mock.patch.object(bf16_matmul, "_is_faster", return_value=True),
        mock.patch.dict(symmetric._STRIP, cpu=symmetric._STRIP["cuda"]),
        mock.patch.object(refine, "product", multiply),
        mock.patch.object(regularizer, "product", multiply),
        mock.patch.object(regularizer, "invert_", as_kernels(counter, regularizer.invert_, 0)),  # type: ignore[attr-defined]
    ):
        yield


@contextmanager
def counted_kernels(counter: Launches) -> Iterator[None]:
    """Count what is compiled by its kernels."""
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(compiled, "is_enabled", return_value=True))
        for module, name, kernels in _COMPILED:
            replacement = as_kernels(counter, getattr(module, name).__wrapped__, kernels)
            patched.enter_context(mock.patch.object(module, name, replacement))
        yield


def as_kernels(counter: Launches, function: Callable, kernels: int) -> Callable:
    """The function, counted as so many launches."""

    def call(*args):
        counter.launches[_key()] += kernels
        counter.inside_kernel = True
        try:
            return function(*args)
        finally:
            counter.inside_kernel = False

    return call


class HostCopies(TorchFunctionMode):
    """Counts copies of whole tensors to the host, which a CPU does without an operator, among the syncs."""

    def __init__(self, counter: Launches) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _COPIES:
            self._counter.syncs[_key()] += 1
        return func(*args, **(kwargs or {}))


def _key() -> tuple[str, str]:
    """Phase and line of what is called now."""
    frames = _frames()
    return _phase([function for _, function in frames]), frames[0][0]


def _phase(functions: list[str]) -> str:
    """Of an operator by the functions of ours that it was called in, the innermost first."""
    if "weigh" not in functions and "solve_rows" in functions:
        called = reversed(functions[: functions.index("solve_rows")])  # the outermost first
        return next((_SOLVE[name] for name in called if name in _SOLVE), "figures")
    return next((phase for function, phase in _PHASES.items() if function in functions), "other")


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _frames() -> list[tuple[str, str]]:
    """Line and function of every frame of ours, the innermost first."""
    found, frame, folder = [], sys._getframe(1), str(ROOT / "astro") + "/"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(folder):
            found.append((f"{name.removeprefix(folder)}:{frame.f_lineno}", frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return found or [("elsewhere", "")]


def run_group(columns: int, settings: Quantization, plain: bool) -> Launches:
    """Everything that is done for a group of layers, with one chunk, one tile and one tile of the sample."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, columns, generator=generator) * 0.02
    X = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    layout, counters = LAYOUTS["compressed-tensors"], []
    # The search may find 0 best, and nothing to regularize then: what follows it is counted with a β that is given.
    for settings_of_beta in (Regularizer(), Regularizer(beta=1e-4)):
        sums = HessianAccumulator(columns, torch.device("cpu"))
        counter = Launches()
        kernels = nullcontext() if plain else counted_kernels(counter)
        with torch.no_grad(), counter, HostCopies(counter), as_on_a_gpu(counter), kernels:
            sums.add_(X.bfloat16())
            known = InputStatistics(("layer",), sums.finish_("layer"), len(X), len(X))
            schemes = {"layer": settings.scheme("layer", columns)}
            recipe = Recipe(settings, settings_of_beta, torch.bfloat16)
            layers, _ = quantize_block({"layer": W}, [["layer"]], [known], schemes, recipe)
            layout.pack_linear("layer", layers["layer"], torch.bfloat16)
        counters.append(counter)
    searched, given = counters
    for which in ("launches", "syncs"):
        search = {key: n for key, n in getattr(searched, which).items() if key[0] in ("beta", "choose")}
        getattr(given, which).update(search)
    return given


def by_phase(counts: Counter) -> Counter:
    """Over all lines."""
    total: Counter = Counter()
    for (phase, _), number in counts.items():
        total[phase] += number
    return total


class Lines:
    """Counts that grow with the columns, each as a constant and a slope."""

    def __init__(self, narrow: Counter, wide: Counter, widest: Counter) -> None:
        step, self.slopes, self.fixed = WIDTHS[1] - WIDTHS[0], {}, {}
        for key in {**narrow, **wide}:
            self.slopes[key] = (wide[key] - narrow[key]) / step
            self.fixed[key] = narrow[key] - self.slopes[key] * WIDTHS[0]
            expected = self.fixed[key] + self.slopes[key] * WIDTHS[2]
            # The choice of β looks at one value more where it is not 0.
            assert abs(expected - widest[key]) <= 1, f"{key} does not grow evenly: {expected} and {widest[key]}"

    def at(self, key: object, columns: int) -> float:
        """The count for some width."""
        return self.fixed.get(key, 0.0) + self.slopes.get(key, 0.0) * columns


def times(phase: str, rows: int, columns: int, chunks: int) -> int:
    """How often a phase is done for a group of layers."""
    of = TIMES.get(phase, "tile")
    tiles = {"tile": row_tiles, "sample tile": beta_search.sample_tiles}.get(of)
    return len(tiles(rows, columns, "cuda")) if tiles else chunks if of == "chunk" else 1


def main() -> None:
    """Count, extrapolate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="70B", choices=list(SHAPES))
    parser.add_argument("--chunks", type=int, default=64, help="of calibration text")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--plain", action="store_true", help="nothing is compiled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Quantization(group_size=options.group_size, refine_tolerance=0.0)
    counters = [run_group(columns, settings, options.plain) for columns in WIDTHS]
    launches, syncs = (Lines(*(by_phase(getattr(own, which)) for own in counters)) for which in ("launches", "syncs"))
    groups = SHAPES[options.shapes]
    print(f"A block of {options.shapes}, group {options.group_size}, {settings.refine_passes} refinement passes, "
          f"{options.chunks} chunks\n")  # fmt: skip
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
    print_lines("syncs", Lines(*(own.syncs for own in counters)), WIDTHS[0], 1.0)
    print_lines("launches a column", Lines(*(own.launches for own in counters)), None, _LEAST_SHOWN)
    step_s = DEVICES["h100"].step_s
    print(f"At {step_s * 1e6:g} µs a launch, as `plan` takes it: {sums[0] * step_s:.1f} s a block.")


def print_lines(title: str, lines: Lines, columns: int | None, least: float) -> None:
    """Print the lines of most counts, at some width or for each column; the search of β goes through the same lines."""
    print(f"| phase | line | {title} |\n|---|---|---|")
    counts = lines.slopes if columns is None else {key: lines.at(key, columns) for key in lines.fixed}
    for (phase, line), number in sorted(counts.items(), key=lambda item: -item[1]):
        if number >= least and phase != "beta":
            print(f"| {phase} | {line} | {number:.2f} |")
    print()


if __name__ == "__main__":
    main()
