"""The steps of `gpu.py` that are whole runs: small models on CPU and GPU, blocks of true sizes, two actors of Ray."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from floor import shape_of
from gpu_findings import Bench
from gpu_foretold import foretold
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from astro.storage.atomic import sha256_of
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.planning.validate import prepare
from astro_dist.worker.worker import Worker

_SHARD_BYTES = 2e9
SMALL = {"hidden": 512, "intermediate": 1536, "heads": 8, "layers": 3}
TINY = {"hidden": 128, "intermediate": 256, "heads": 2, "layers": 2}
BLOCKS = {
    "block8b": {"hidden": 4096, "intermediate": 14336, "heads": 32, "layers": 1},
    "block70b": {"hidden": 8192, "intermediate": 28672, "heads": 64, "layers": 1},
    "experts": {"hidden": 2048, "intermediate": 768, "heads": 32, "layers": 1, "experts": 128, "chosen": 8},
}
TEXT = {"samples": 16, "sequence_length": 2048, "chunk_samples": 4, "holdout_samples": 2}
SHORT = {"samples": 6, "sequence_length": 64, "chunk_samples": 2, "holdout_samples": 2}


def model(bench: Bench, sizes: dict[str, int], dtype: str = "bfloat16") -> Path:
    """Make a model of random heavy-tailed weights whose inputs are correlated, and a text of its words, once."""
    name = "-".join(str(value) for value in (*sizes.values(), dtype))
    folder = bench.work / f"model-{name}"
    if (folder / "words.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words, hidden = 2048, sizes["hidden"]
    common = {
        "vocab_size": words, "hidden_size": hidden, "num_hidden_layers": sizes["layers"], "dtype": dtype,
        "num_attention_heads": sizes["heads"], "num_key_value_heads": max(sizes["heads"] // 8, 1),
        "head_dim": hidden // sizes["heads"], "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "intermediate_size": sizes["intermediate"],
    }  # fmt: skip
    config: Any = transformers.LlamaConfig(**common)
    if "experts" in sizes:
        config = transformers.Qwen3MoeConfig(
            **common, num_experts=sizes["experts"], num_experts_per_tok=sizes["chosen"],
            moe_intermediate_size=sizes["intermediate"], norm_topk_prob=True,
        )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    _write_weights(bench, folder, dict(_stored(shapes, sizes["intermediate"])), getattr(torch, dtype))
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    # Few words are frequent, most are rare.
    drawn = (words ** torch.rand(1 << 17, generator=torch.Generator().manual_seed(0))).long() - 1
    (folder / "words.txt").write_text(" ".join(f"w{i}" for i in drawn.tolist()))
    return folder


def _stored(shapes: dict[str, torch.Size], intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the Hub has them: experts one by one."""
    for name, shape in shapes.items():
        stem, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or len(shape) != 3:
            yield name, tuple(shape)
            continue
        for expert in range(shape[0]):
            for part in ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",):
                rows = intermediate if last == "gate_up_proj" else shape[1]
                yield f"{stem}.{expert}.{part}.weight", (rows, shape[2])


def _write_weights(bench: Bench, folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=bench.device)  # noqa: E731
    files: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if "norm" in name:
            W = 1 + 0.1 * draw(*shape)
        elif "embed_tokens" in name:
            rank = shape[1] // 4
            W = (draw(shape[0], rank) @ (draw(rank, shape[1]) * draw(shape[1]) ** 2) + 0.1 * draw(*shape)) / rank**0.5
        else:
            W = draw(*shape) * 0.02
        shard[name] = W.to(dtype).cpu().contiguous()
        if sum(X.nbytes for X in shard.values()) > _SHARD_BYTES or len(files) + len(shard) == len(shapes):
            file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def configured(bench: Bench, source: Path, name: str, text: dict[str, int], **execution: Any) -> RunConfig:
    """Return the configuration of a run on a model that this module made."""
    group_size = 128 if json.loads((source / "config.json").read_text())["hidden_size"] >= 2048 else 64
    content = {
        "model": {"source": str(source), "check_weights": False},
        "quantization": {"group_size": group_size, "tune_steps": 2 if bench.tiny else 16},
        "calibration": {"source": str(source / "words.txt"), **text},
        "execution": {"executor": "local", "workers": 1, "device": bench.device.type, **execution},
        "output": {"dir": str(bench.work / f"run-{name}".replace(" ", "-"))},
    }
    return RunConfig.model_validate(content)


def quantized(config: RunConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Run anew, and return the figures and the files' checksums."""
    shutil.rmtree(config.output.dir, ignore_errors=True)
    start = time.perf_counter()
    summary = pipeline.quantize(config)
    figures = {
        "wall_s": round(time.perf_counter() - start, 1),
        "phases_s": {phase: round(s, 2) for phase, s in summary.phases_s.items()},
        "perplexity": [summary.perplexity.original, summary.perplexity.quantized],
        "mean_relative_error": summary.mean_relative_error,
        "retries": len(summary.retries),
    }
    return figures, {path.name: sha256_of(path) for path in sorted(Path(summary.model).glob("*.safetensors"))}


def runs(bench: Bench) -> None:
    """Quantize a small model on the CPU and on the device, in every kind of loops, and twice."""
    on_gpu = bench.device.type == "cuda"
    cases: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}, "plain": {"compile": False}}
    cases |= {"compiled": {"compile": True}, "kernels": {"compile": "kernels"}} if on_gpu else {}
    cases |= {"sequential": {"mode": "sequential"}}
    results: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for dtype in ("float32",) if bench.tiny else ("float32", "bfloat16"):
        source = model(bench, TINY if bench.tiny else SMALL, dtype)
        for name, changes in cases.items():
            with bench.finding(f"{dtype}, {name}") as found:
                text = SHORT if bench.tiny else TEXT | {"sequence_length": 512}
                config = configured(bench, source, f"{dtype} {name}", text, **changes)
                figures, files = results[f"{dtype} {name}"] = quantized(config)
                found |= figures
                if name != "cpu":
                    found["same twice"] = quantized(config)[1] == files
                    other = results[f"{dtype} cpu"][0]["mean_relative_error"]
                    found["error over the CPU's"] = figures["mean_relative_error"] / other
                    allowed = 0.02 if dtype == "float32" and name != "sequential" else 0.1
                    found["ok"] = found["same twice"] and (
                        name == "sequential" or abs(found["error over the CPU's"] - 1) < allowed
                    )


def block8b(bench: Bench) -> None:
    """Quantize a block as an 8B has it."""
    _block(bench, "block8b")


def block70b(bench: Bench) -> None:
    """Quantize a block as a 70B has it."""
    _block(bench, "block70b")


def experts(bench: Bench) -> None:
    """Quantize a block of 128 experts."""
    _block(bench, "experts")


def _block(bench: Bench, name: str) -> None:
    sizes = BLOCKS[name]
    if bench.tiny:
        sizes = TINY | {"layers": 1} | ({"experts": 4, "chosen": 2} if "experts" in sizes else {})
    with bench.finding(f"{name}, made") as found:
        source = model(bench, sizes)
        found["gb"] = round(sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9, 2)
    with bench.finding(name) as found:
        config = configured(bench, source, name, SHORT if bench.tiny else TEXT)
        spent: dict[str, float] = {}
        bench.peak_gb(reset=True)
        with _timed_calls(bench, spent):
            found |= quantized(config)[0]
        found |= {"calls_s": {call: round(s, 2) for call, s in spent.items()}, "peak_gb": bench.peak_gb()}
        found |= foretold(bench, prepare(config).plan, shape_of(source, config, 2), config)


@contextlib.contextmanager
def _timed_calls(bench: Bench, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of a worker's calls by kind, the device at rest before and after."""
    real = Worker.do

    def do(self: Worker, call: Any) -> Any:
        bench.wait()
        start = time.perf_counter()
        try:
            return real(self, call)
        finally:
            bench.wait()
            kind = type(call).__name__
            spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - start

    Worker.do = do  # type: ignore[method-assign]
    try:
        yield
    finally:
        Worker.do = real  # type: ignore[method-assign]


def ray(bench: Bench) -> None:
    """Let two actors of Ray, on one GPU where there is one, make what one process makes."""
    root = str(Path(__file__).resolve().parents[2])
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_enable_metrics_collection": "0",
        "RAY_memory_monitor_refresh_ms": "0", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join([root, *sys.path]),
    }  # fmt: skip
    import ray as library

    source, text = model(bench, TINY if bench.tiny else SMALL), SHORT if bench.tiny else TEXT | {"sequence_length": 512}
    with bench.finding("Ray starts") as found:
        gpus = 2 if bench.device.type == "cuda" else 0
        library.init(
            address="local", num_cpus=4, num_gpus=gpus, include_dashboard=False, object_store_memory=100_000_000,
            log_to_driver=False,
        )  # fmt: skip
        found["resources"] = library.cluster_resources()
    for mode in ("blocks",) if bench.tiny else ("blocks", "sequential"):
        with bench.finding(f"{mode}: two actors, and one process") as found:
            one = configured(bench, source, f"ray one {mode}", text, mode=mode)
            two = configured(bench, source, f"ray two {mode}", text, mode=mode, executor="ray", workers=2)
            (alone, here), (together, there) = quantized(one), quantized(two)
            found |= {"one_s": alone["wall_s"], "two_s": together["wall_s"], "ok": here == there}
            found["same bytes"] = here == there
    library.shutdown()
