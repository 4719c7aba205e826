"""The steps of `gpu.py` about the loops over columns: their time, a peer's solve of the same layers, a wide input."""

import contextlib
import importlib.machinery
import importlib.util
import sys
import time
import types

import torch
from gpu_findings import Bench, hessians, inputs, weights
from gpu_foretold import foretold, lone_layer
from gpu_graphs import graphs

from astro.calibration.hessian import HessianAccumulator
from astro.config import Quantization, Regularizer
from astro.linalg import compiled
from astro.linalg.cholesky import factorize
from astro.linalg.symmetric import layer_error
from astro.quantization import gptq
from astro.quantization.grid import QuantizedLinear, fit_grid
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from astro.quantization.refine import refine

PLAIN = {"scale_search": "mse", "signed_scales": False, "refine_passes": 0}


def ways(bench: Bench) -> list[compiled.ColumnLoops]:
    """Return the kinds of loops that the device has; torch.compile takes a CPU minutes, and shows nothing there."""
    return ["plain", "compiled", "kernels"] if bench.device.type == "cuda" else ["plain"]


def loops(bench: Bench) -> None:
    """Time GPTQ and a pass of refinement by columns, in every way and as CUDA graphs, and the first call apart."""
    columns = 256 if bench.tiny else 2048
    settings = Quantization(group_size=128, refine_passes=1, refine_tolerance=0.0)
    H = hessians(1, columns).to(bench.device)
    factor = factorize(H, gptq.activation_order(H), 0.01, 1.0, ["x"])
    damping = factor.damping.float() * H.diagonal(dim1=-2, dim2=-1).mean(-1)
    first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for way in [*ways(bench), *(["graphs"] if bench.device.type == "cuda" else [])]:
        compiled.use("plain" if way == "graphs" else way)
        for rows in (64,) if bench.tiny else (640, 4096, 16384):
            name = f"loops {way}, {rows} rows of {columns}"
            with bench.finding(name) as found, graphs() if way == "graphs" else contextlib.nullcontext():
                W = weights(1, rows, columns).to(bench.device)
                grid = fit_grid(W, settings.scheme("x", columns), settings, torch.bfloat16, factor.cost)
                start = time.perf_counter()
                Q = gptq.solve(W, factor, grid)
                refined, _ = refine(W, QuantizedLinear(Q, grid), H, damping, settings, torch.bfloat16)
                bench.wait()
                found["first_s"] = round(time.perf_counter() - start, 2)
                actions = {
                    "gptq": lambda W=W, grid=grid: gptq.solve(W, factor, grid),
                    "pass": lambda W=W, Q=Q, grid=grid: refine(
                        W, QuantizedLinear(Q, grid), H, damping, settings, torch.bfloat16
                    ),
                }
                for name, action in actions.items():
                    found[f"{name}_us_a_column"] = round(bench.seconds(action, 2) / columns * 1e6, 2)
                    start = time.perf_counter()
                    action()
                    found[f"{name}_host_us_a_column"] = round((time.perf_counter() - start) / columns * 1e6, 2)
                    bench.wait()
                plain = first.setdefault(rows, (Q, refined.Q))
                found["integers as plain"] = [
                    float((a == b).float().mean()) for a, b in zip((Q, refined.Q), plain, strict=True)
                ]
                found["same twice"] = torch.equal(gptq.solve(W, factor, grid), Q)
                found["ok"] = found["same twice"] and min(found["integers as plain"]) > 0.99
        if bench.device.type == "cuda" and way != "graphs":
            _profile(bench, way, W, H)
    compiled.use("plain")


def _profile(bench: Bench, way: str, W: torch.Tensor, H: torch.Tensor) -> None:
    """Count the kernels of a whole input group, and their time on the device beside the time that passes."""
    from torch.profiler import ProfilerActivity, profile

    with bench.finding(f"kernels of a group, loops {way}") as found:
        settings = Quantization(group_size=128)
        recipe, scheme = Recipe(settings, Regularizer(), torch.bfloat16), settings.scheme("x", H.shape[-1])
        job = lambda: quantize_input_groups([{"x": W[0]}], InputMoments(H), [9], scheme, recipe)  # noqa: E731
        found["s"] = round(bench.seconds(job, 1), 3)
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            job()
            bench.wait()
        kernels = [e for e in watched.key_averages() if str(e.device_type) == "DeviceType.CUDA"]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        found["launches"] = sum(e.count for e in kernels)
        found["busy_s"] = round(sum(e.self_device_time_total for e in kernels) / 1e6, 3)
        found["longest"] = [[e.key[:60], e.count, round(e.self_device_time_total / 1e3, 2)] for e in kernels[:12]]


def peer(bench: Bench) -> None:
    """Solve the layers of an 8B with llm-compressor's own function, and with ours as plain GPTQ and as shipped."""
    theirs = None
    with bench.finding("llm-compressor") as found:
        theirs = _their_solve()
        found["found"] = theirs is not None
    shapes = {"o": (128, 256)} if bench.tiny else {"q": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
    for name, (rows, columns) in shapes.items():
        X = inputs(4096, columns).to(bench.device)
        H = (X.T @ X / len(X) + 1e-3 * torch.eye(columns, device=bench.device))[None]
        W = weights(rows, columns).to(bench.device)
        energy = float(layer_error(W[None], torch.zeros_like(W)[None], H).sum())
        if theirs is not None:
            with bench.finding(f"{name} {rows} x {columns}, llm-compressor") as found:
                _their_layer(bench, theirs, W, H, energy, found)
        for title, changes, regularizer in (
            ("ours, plain GPTQ", PLAIN, Regularizer(name="none")), ("ours, as shipped", {}, Regularizer()),
        ):  # fmt: skip
            settings = Quantization(**{"group_size": 128, **changes})
            recipe, scheme = Recipe(settings, regularizer, torch.bfloat16), settings.scheme("x", columns)
            for way in ways(bench):
                compiled.use(way)
                with bench.finding(f"{name}, {title}, loops {way}") as found:
                    job = lambda W=W, H=H, scheme=scheme, recipe=recipe: quantize_input_groups(  # noqa: E731
                        [{"x": W}], InputMoments(H), [9], scheme, recipe
                    )
                    found["s"] = round(bench.seconds(job, 1), 3)
                    found["relative_error"] = job()[1][0].relative_error
    compiled.use("plain")


def _their_solve() -> types.ModuleType | None:
    """Import the peer's module alone: its package imports at its top what a bare machine lacks."""
    if importlib.util.find_spec("llmcompressor") is None:
        return None
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        above, _, last = name.rpartition(".")
        spec = importlib.machinery.PathFinder.find_spec(last, sys.modules[above].__path__ if above else None)
        assert spec is not None
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name].__spec__ = spec
    return importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")


def _their_layer(
    bench: Bench, theirs: types.ModuleType, W: torch.Tensor, H: torch.Tensor, energy: float, found: dict
) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    settings = Quantization(**{"group_size": 128, **PLAIN})
    grid = fit_grid(W[None], settings.scheme("x", W.shape[1]), settings, torch.bfloat16)
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, actorder="static"
    )  # fmt: skip
    zero = grid.zero.to(torch.int8)
    job = lambda: theirs.quantize_weight(W[None].clone(), H.clone(), grid.scale, zero, None, args)  # noqa: E731
    found["s"] = round(bench.seconds(job, 2), 3)
    found["relative_error"] = float(layer_error(W[None], job()[0], H).sum()) / energy


def block405b(bench: Bench) -> None:
    """Solve a few rows of the widest input of a 405B, whose square has more than 2³¹ elements."""
    rows, columns, tokens = (128, 512, 1024) if bench.tiny else (256, 53248, 16384)
    compiled.use(ways(bench)[-1])
    with bench.finding(f"{rows} rows of {columns}") as found:
        bench.peak_gb(reset=True)
        generator = torch.Generator(bench.device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=bench.device)  # noqa: E731
        scale, sums = draw(columns).abs() + 0.1, HessianAccumulator(columns, bench.device)
        chunks = [(draw(tokens, columns) * scale).bfloat16() for _ in range(2)]
        found["hessian_chunk_s"] = round(bench.seconds(lambda: sums.add_(chunks[0]), 1), 2)
        sums.add_(chunks[1])
        H = sums.finish_("x")
        found["corners"] = [
            float(H[0, 0] / scale[0] ** 2),
            float(H[-1, 0] - H[0, -1]),
            float(H[-1, -1] / scale[-1] ** 2),
        ]
        settings = Quantization(group_size=128)
        recipe, scheme = Recipe(settings, Regularizer(), torch.bfloat16), settings.scheme("x", columns)
        start = time.perf_counter()
        _, (record,) = quantize_input_groups(
            [{"x": draw(rows, columns) * 0.02}], InputMoments(H[None]), [9], scheme, recipe
        )
        bench.wait()
        found |= {"s": round(time.perf_counter() - start, 1), "phases_s": record.seconds, "peak_gb": bench.peak_gb()}
        found["relative_error"] = record.relative_error
        found |= foretold(bench, *lone_layer(bench, rows, columns, len(chunks) * tokens))
        corners = found["corners"]
        found["ok"] = max(abs(corners[0] - 1), abs(corners[2] - 1)) < 0.15 and corners[1] == 0
        found["ok"] = found["ok"] and 0 < record.relative_error < 0.05
