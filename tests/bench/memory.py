"""Peak resident memory of driver and workers on a fabricated checkpoint of random weights.

    python tests/bench/memory.py --folder DIR --layers 22

TinyLlama's shape (hidden 2048, intermediate 5632), bfloat16, eight shards: 22 layers are 2.2 GB.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

SHARDS = 8


def fabricate(folder: Path, layers: int) -> None:
    """Write the checkpoint shard by shard, never whole in memory."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from astro.checkpoint import INDEX_NAME, write_json
    from tests.conftest import byte_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
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


def main() -> None:
    """Fabricate, quantize, print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    source = options.folder / f"source-{options.layers}"
    if not (source / "tokenizer.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        fabricate(source, options.layers)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    config = options.folder / "config.json"  # JSON is YAML
    content = {
        "model": {"source": str(source)},
        "regularizer": {"iterations": 2},
        "calibration": {"samples": 4, "sequence_length": 256, "chunk_samples": 2, "holdout_samples": 2},
        "execution": {"workers": options.workers, "device": "cpu"},
        "output": {"dir": str(options.folder / f"run-{options.layers}")},
    }
    config.write_text(json.dumps(content))
    command = [sys.executable, "-m", "astro_dist", "quantize", str(config), "--json"]
    summary = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    peaks = {name: f"{peak / 1e6:.0f} MB" for name, peak in summary["peak_rss_bytes"].items()}
    print(f"source {size / 1e9:.2f} GB, wall {summary['wall_s']:.0f} s, peak resident memory: {peaks}")


if __name__ == "__main__":
    main()
