"""The steps of `gpu.py` about the machine and about arithmetic."""

import os
import platform
import shutil
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_findings import Bench, far, hessians, inputs, weights

from astro.calibration.drift import DriftAccumulator
from astro.calibration.hessian import HessianAccumulator
from astro.config import Quantization, Regularizer
from astro.formats import LAYOUTS
from astro.linalg import bf16_matmul, compiled
from astro.linalg.cholesky import factorize
from astro.linalg.spd_inverse import invert_
from astro.linalg.symmetric import layer_error, packed, unpacked
from astro.model.attention import saved_memory
from astro.model.gradients import gradients
from astro.quantization import gptq, regularizer
from astro.quantization.grid import QuantizedLinear, fit_grid
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe
from astro.quantization.refine import refine

PACKAGES = ("torch", "triton", "transformers", "ray", "pydantic", "safetensors", "compressed-tensors", "llmcompressor")


def machine(bench: Bench) -> None:
    """Say what the machine is, and how fast."""
    include = Path(sysconfig.get_paths()["include"])
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
    bench.say(
        "versions", python=platform.python_version(), cuda=torch.version.cuda, cpus=os.cpu_count(), gpu=_output(query),
        compilers=[name for name in ("gcc", "g++", "clang") if shutil.which(name)],
        python_h=(include / "Python.h").exists(), libcuda=_output("/sbin/ldconfig -p | grep libcuda.so"),
        environment={name: os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")},
        **{name: _version(name) for name in PACKAGES},
    )  # fmt: skip
    size, device = 1024 if bench.tiny else 8192, bench.device
    A = torch.randn(size, size, device=device)
    B = A.bfloat16()
    with bench.finding("rates") as found:
        for name, X in (("float32", A), ("bfloat16", B)):
            found[f"{name}_tflops"] = round(2 * size**3 / bench.seconds(lambda X=X: X @ X) / 1e12, 2)
        found["copy_gb_s"] = round(2 * A.nbytes / bench.seconds(A.clone) / 1e9)
        x = torch.zeros(4096, device=device)
        found["launch_us"] = round(bench.seconds(lambda: [x.add_(1.0) for _ in range(1000)]) * 1e3, 2)
    with bench.finding("Cholesky, together and one by one") as found:
        count, columns = (2, 256) if bench.tiny else (32, 2048)
        H = (A @ A.T / size + torch.eye(size, device=device))[:columns, :columns]
        P = H.expand(count, columns, columns).contiguous()
        found["together_s"] = bench.seconds(lambda: torch.linalg.cholesky_ex(P))
        found["one_by_one_s"] = bench.seconds(lambda: [torch.linalg.cholesky_ex(M) for M in P])
    if device.type == "cuda":
        with bench.finding("allocator") as found:
            found |= torch.cuda.memory._snapshot()["allocator_settings"]
            found["ok"] = found["expandable_segments"]
        with bench.finding("transfers") as found:
            pageable = torch.zeros(1 << 28, dtype=torch.uint8)
            pinned, there = pageable.pin_memory(), pageable.cuda()
            actions = {
                "to_device_gb_s": pageable.cuda, "to_device_pinned_gb_s": lambda: there.copy_(pinned, True),
                "to_host_gb_s": there.cpu, "to_host_pinned_gb_s": lambda: pinned.copy_(there, True),
            }  # fmt: skip
            found |= {name: round((1 << 28) / bench.seconds(action) / 1e9, 1) for name, action in actions.items()}


def arithmetic(bench: Bench) -> None:
    """Compare each part of the solve with float64 and with the CPU."""
    device = bench.device
    with bench.finding("products of rounded factors") as found:
        A, B = (bf16_matmul.operand(X.to(device)) for X in (weights(3, 300, 512), weights(3, 512, 200, seed=2)))
        found["far"] = far(bf16_matmul.product(A, B), A.double().cpu() @ B.double().cpu())
        found["ok"] = found["far"] < (1e-5 if device.type == "cuda" else 1e-2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with bench.finding(f"Hessian and drift of {dtype}") as found:
            X = inputs(3000, 1536).to(dtype)
            sums, drift = HessianAccumulator(1536, device), DriftAccumulator(1536, device)
            for part in X.to(device).split(1000):
                sums.add_(part)
            Y = (X.float() + 0.1 * inputs(3000, 1536, 5)).to(dtype)
            drift.add_(Y.to(device), X.to(device))
            found["hessian"] = far(sums.partial.triu() / 3000, (X.double().T @ X.double() / 3000).triu())
            D = drift.finish_("x", torch.ones(1536, device=device))
            found["drift"] = far(D, (Y.double() - X.double()).T @ X.double() / 3000)
            found["ok"] = found["hessian"] < 2e-6 and found["drift"] < 1e-4
    one, three = hessians(1, 768 if bench.tiny else 1536), hessians(3, 320)
    for H in (one, three):
        with bench.finding(f"factor, inverse, eigenvalue, packed half of {list(H.shape)}") as found:
            _matrices(H, device, found)
    for changes in ({}, {"bits": 2}, {"bits": 3, "symmetric": False, "scale_search": "mse"}):
        with bench.finding(f"grid, GPTQ, refinement {changes or 'as shipped'}") as found:
            for H in (one, three):
                found[f"{len(H)} side by side"] = _rows(H, bench, Quantization(**{"group_size": 64, **changes}))
            found["ok"] = all(x["ok"] for x in found.values())
    for loops in ("plain", "kernels") if device.type == "cuda" else ("plain",):
        with bench.finding(f"a whole input group, loops {loops}") as found:
            compiled.use(loops)
            _whole(three, bench, found)
    compiled.use("plain")


def attention(bench: Bench) -> None:
    """Time attention as an 8B and a 70B have it, forward and back, and find the most memory that it holds."""
    for model, heads in {"8B": 32, "70B": 64}.items():
        for dtype in (torch.bfloat16, torch.float32):
            with bench.finding(f"attention of {model}, {dtype}") as found:
                _attention(bench, heads, dtype, found)


def _attention(bench: Bench, heads: int, dtype: torch.dtype, found: dict) -> None:
    batch, tokens, width = (1, 64, 16) if bench.tiny else (2, 2048, 128)
    generator = torch.Generator(bench.device).manual_seed(0)
    shapes = [(batch, count, tokens, width) for count in (heads, 8, 8, heads)]
    *QKV, wanted = (torch.randn(*s, generator=generator, device=bench.device).to(dtype) for s in shapes)
    scores_gb = batch * heads * tokens**2 * dtype.itemsize / 1e9
    found |= {"inputs_gb": round(sum(X.nbytes for X in (*QKV, wanted)) / 1e9, 3), "scores_gb": round(scores_gb, 3)}
    for name, job in {"forward": lambda: _attended(QKV), "forward and back": lambda: _back(QKV, wanted)}.items():
        bench.peak_gb(reset=True)
        found[f"{name}_ms"] = round(bench.seconds(job) * 1e3, 2)
        found[f"{name}_peak_gb"] = bench.peak_gb()
    once, again = (_back(QKV, wanted) for _ in range(2))
    found["same twice"] = all(map(torch.equal, once, again))
    # The kernel that holds every score holds several such squares on its way back.
    saves = bench.tiny or bench.device.type == "cpu" or found["forward and back_peak_gb"] < scores_gb
    found["ok"] = found["same twice"] and saves


def _attended(QKV: list[torch.Tensor]) -> torch.Tensor:
    with saved_memory(QKV[0]):
        return torch.nn.functional.scaled_dot_product_attention(*QKV, is_causal=True, enable_gqa=True)


def _back(QKV: list[torch.Tensor], wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with gradients(wanted.device):
        leaves = [X.detach().requires_grad_() for X in QKV]
        return torch.autograd.grad(_attended(leaves), leaves, wanted)


def _matrices(H: torch.Tensor, device: torch.device, found: dict) -> None:
    there = H.to(device)
    size = H.shape[-1]
    factor = factorize(there, gptq.activation_order(there), 0.01, 1.0, list("abc")[: len(H)])
    eye = torch.eye(size, dtype=torch.float64)
    damped = H.double() + 0.01 * H.double().diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    A = weights(len(H), 64, size)
    # One after the other: batched inverses of some builds are wrong on one thread of a CPU.
    inverse = torch.stack([torch.linalg.inv(M) for M in damped])
    found["solve"] = far(factor.solve(A.to(device)), A.double() @ inverse)
    largest = torch.stack([torch.linalg.eigvalsh(M)[-1] for M in H.double()])
    found["eigenvalue"] = far(regularizer.largest_eigenvalue(there), largest)
    M = damped.float().to(device)
    found["status"] = invert_(M).tolist()
    found["inverse"] = far(M, inverse)
    found["packed"] = torch.equal(unpacked(packed(there), size), there.triu() + there.triu(1).mT)
    found["ok"] = found["solve"] < 1e-2 > found["inverse"] and found["eigenvalue"] < 2e-2 and found["packed"]


def _rows(H: torch.Tensor, bench: Bench, settings: Quantization) -> dict:
    """Errors of GPTQ and of refinement on the device over those on the CPU."""
    W, results = weights(len(H), 96, H.shape[-1]), {}
    for name, place in bench.places().items():
        h, w = H.to(place), W.to(place)
        factor = factorize(h, gptq.activation_order(h), 0.01, 1.0, list("abc")[: len(H)])
        grid = fit_grid(w, settings.scheme("x", H.shape[-1]), settings, torch.bfloat16, factor.cost)
        Q = gptq.solve(w, factor, grid)
        damping = factor.damping.float() * h.diagonal(dim1=-2, dim2=-1).mean(-1)
        refined, errors = refine(w, QuantizedLinear(Q, grid), h, damping, settings, torch.bfloat16)
        results[name] = (
            Q.cpu(),
            float(layer_error(w, grid.dequantize(Q), h).sum()),
            refined.Q.cpu(),
            float(errors.sum()),
        )
    here, there, again = (results[name] for name in ("cpu", "device", "again"))
    found = {
        "integers equal": float((here[0] == there[0]).float().mean()),
        "GPTQ": there[1] / here[1],
        "refined": there[3] / here[3],
        "same twice": torch.equal(there[0], again[0]) and torch.equal(there[2], again[2]),
    }
    return found | {"ok": found["same twice"] and max(abs(found["GPTQ"] - 1), abs(found["refined"] - 1)) < 0.02}


def _whole(H: torch.Tensor, bench: Bench, found: dict) -> None:
    settings, W, results = Quantization(group_size=64), weights(len(H), 40, H.shape[-1]), {}
    for name, place in bench.places().items():
        groups = [{f"gate{i}": W[i, :24].to(place), f"up{i}": W[i, 24:].to(place)} for i in range(len(H))]
        recipe, scheme = Recipe(settings, Regularizer(), torch.bfloat16), settings.scheme("x", H.shape[-1])
        results[name] = quantize_input_groups(groups, InputMoments(H.to(place)), [1000] * len(H), scheme, recipe)
    (_, here), (layers, there), (same, _) = (results[name] for name in ("cpu", "device", "again"))
    found["error over the CPU's"] = [b.relative_error / a.relative_error for a, b in zip(here, there, strict=True)]
    found["betas"] = [[a.beta, b.beta] for a, b in zip(here, there, strict=True)]
    pack = LAYOUTS["compressed-tensors"].pack_linear
    files = [[pack(name, linear, torch.bfloat16) for name, linear in of.items()] for of in (layers, same)]
    found["same twice"] = all(torch.equal(a[key], b[key]) for a, b in zip(*files, strict=True) for key in a)
    found["ok"] = found["same twice"] and all(abs(ratio - 1) < 0.05 for ratio in found["error over the CPU's"])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(command: str) -> str:
    try:
        return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=10).stdout.strip()[:300]
    except subprocess.TimeoutExpired:
        return "no answer in 10 s"
