"""Peak resident memory of driver and workers on checkpoints of random weights, beside what `plan` foretells.

    python tests/bench/memory.py --folder DIR --shapes tinyllama --layers 22 --workers 2
    python tests/bench/memory.py --folder DIR --layers 2

The checkpoints are in bfloat16 and have eight shards; 22 layers of TinyLlama's shape are 2.2 GB. Without `--shapes` it
takes all shapes. With `--light` a large checkpoint takes minutes: one layer of each block is quantized and the others
are copied, which makes no difference to the driver. The output is Markdown.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

SHARDS = 8
# hidden, intermediate, heads, heads of keys and values, vocabulary
SHAPES = {
    "tinyllama": (2048, 5632, 32, 4, 32000),
    "wide": (1024, 8192, 16, 16, 32000),
    "large-vocabulary": (1536, 4096, 12, 2, 151936),
    "experts": (1024, 512, 8, 4, 32000),
}
EXPERTS, CHOSEN = 64, 4


def fabricate(folder: Path, sizes: tuple[int, int, int, int, int], layers: int, experts: bool = False) -> None:
    """Write a checkpoint of sizes as in `SHAPES` shard by shard, so that it is never whole in memory.

    With `experts`, the intermediate size is that of each expert.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    from astro.storage.atomic import write_json
    from astro.storage.checkpoint import INDEX_NAME
    from tests.support.models import byte_tokenizer

    hidden, intermediate, heads, kv_heads, vocabulary = sizes
    common = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }  # fmt: skip
    if experts:
        config = transformers.Qwen3MoeConfig(
            **common, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=intermediate
        )
    else:
        config = transformers.LlamaConfig(**common)  # type: ignore[assignment]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    names, weight_map = list(shapes), {}
    per_shard = math.ceil(len(names) / SHARDS)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        torch.manual_seed(shard)
        part = names[shard * per_shard : (shard + 1) * per_shard]
        tensors = {
            n: torch.ones(shapes[n], dtype=torch.bfloat16)
            if "norm" in n
            else (torch.randn(shapes[n]) * 0.02).bfloat16()
            for n in part
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def astro_dist(*arguments: str) -> dict:
    """Run a command, and return what it prints as JSON."""
    command = [sys.executable, "-m", "astro_dist", *arguments, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    """Fabricate, plan, quantize, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--light", action="store_true", help="quantize the attention's output alone")
    options = parser.parse_args()
    print("| shape | layers | source GB | driver MB | worker MB | planned MB | planned / worker | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        name = f"{shape}-{options.layers}"
        source = options.folder / f"source-{name}"
        if not (source / "tokenizer.json").exists():
            source.mkdir(parents=True, exist_ok=True)
            # Apart: a process begins with the peak of the one that starts it.
            arguments = (source, SHAPES[shape], options.layers, shape == "experts")
            maker = multiprocessing.get_context("spawn").Process(target=fabricate, args=arguments)
            maker.start()
            maker.join()
        config = options.folder / f"{name}.json"  # JSON is YAML
        content = {
            "model": {"source": str(source)},
            # Few iterations and passes: they take time, not memory.
            "quantization": {"refine_passes": 1, "ignore": ["*.mlp.*", "*.[qkv]_proj"] if options.light else []},
            "regularizer": {"iterations": 2},
            "calibration": {"samples": 4, "sequence_length": 256, "chunk_samples": 2, "holdout_samples": 2},
            "execution": {"workers": options.workers, "device": "cpu"},
            "output": {"dir": str(options.folder / f"run-{name}")},
        }
        config.write_text(json.dumps(content))
        planned = astro_dist("plan", str(config))["needed"]["worker_bytes"]
        summary = astro_dist("quantize", str(config))
        driver = summary["peak_rss_bytes"].pop("driver")
        worker = max(summary["peak_rss_bytes"].values())
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(
            f"| {shape} | {options.layers} | {size / 1e9:.2f} | {driver / 1e6:.0f} | {worker / 1e6:.0f} | "
            f"{planned / 1e6:.0f} | {planned / worker:.2f} | {summary['wall_s']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
