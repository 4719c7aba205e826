"""The same job by another tool, inside the environment of that tool: it quantizes, then measures perplexity.

    PEER_ENVIRONMENT/bin/python tests/bench/peers.py llm-compressor MODEL TOKENS.safetensors --bits 4 --group-size 64

TOKENS is the `tokens.safetensors` of one of our runs. The tool calibrates on its chunks `c*`, and perplexity is
measured on its chunks `h*`, in float32. Only torch, transformers and safetensors are imported beside the tool itself.
The last line of the output is a JSON object. Its time and peak memory are those of quantizing alone.
"""

import argparse
import json
import math
import resource
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def llm_compressor(model_folder: Path, sequences: torch.Tensor, bits: int, group_size: int) -> dict:
    """Quantize by GPTQModifier with static order, which is its default, and the MSE observer, its best setting."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "observer": "mse", **strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in sequences.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=sequences.shape[1],
        num_calibration_samples=len(rows),
    )
    return {name: module.weight.detach() for name, module in model.named_modules() if is_quantized(name, module)}


def gptqmodel(model_folder: Path, sequences: torch.Tensor, bits: int, group_size: int) -> dict:
    """Quantize by GPTQModel with its MSE search and else its defaults, such as activation order within groups."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    # Its activation order within groups is for groups alone; per channel any order is as good to read.
    order = {} if group_size > 0 else {"act_group_aware": False, "desc_act": True}
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=True, mse=2.4, offload_to_disk=False, **order)
    model = GPTQModel.load(str(model_folder), config, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in sequences]
    model.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        read = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    packed = {name: module for name, module in read.named_modules() if hasattr(module, "qweight")}
    return {name: module.dequantize_weight().T.float().contiguous() for name, module in packed.items()}


def auto_round(model_folder: Path, sequences: torch.Tensor, bits: int, group_size: int, iters: int) -> dict:
    """Quantize by AutoRound with `iters` steps for each block.

    Its default is 200, and 50 with a learning rate of 5e-3 is its `light` recipe.
    """
    from auto_round import AutoRound

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    rate = {"lr": 5e-3} if iters <= 50 else {}
    tool = AutoRound(
        model, tokenizer, bits=bits, group_size=group_size, sym=True, iters=iters, dataset=batches(sequences),
        nsamples=len(sequences), seqlen=sequences.shape[1], batch_size=8, device_map="cpu", **rate,
    )  # fmt: skip
    model, _ = tool.quantize()
    return {name: module.weight.detach() for name, module in model.named_modules() if is_quantized(name, module)}


def batches(sequences: torch.Tensor) -> list[dict]:
    """Return calibration sequences in the form that AutoRound takes."""
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in sequences]


def is_quantized(name: str, module: torch.nn.Module) -> bool:
    """Tell whether a module is a linear layer of a block."""
    return hasattr(module, "weight") and module.weight.ndim == 2 and ".layers." in name  # type: ignore[return-value]


@torch.no_grad()
def perplexity(model_folder: Path, weights: dict, sequences: torch.Tensor) -> float:
    """Measure the perplexity of the float32 model with some of its weights replaced."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and is_quantized(n, m)}
    assert not weights or weights.keys() == linears.keys(), set(weights) ^ set(linears)
    for name, weight in weights.items():
        assert not torch.equal(linears[name].weight, weight), f"{name} was not quantized"
        linears[name].weight.copy_(weight)
    return perplexity_of(model, sequences)


@torch.no_grad()
def perplexity_of(model: torch.nn.Module, sequences: torch.Tensor) -> float:
    """Measure the perplexity of a model on held-out sequences."""
    total = 0.0
    for row in sequences:
        logits = model(row[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / sequences[:, 1:].numel())


def main() -> None:
    """Quantize, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=["llm-compressor", "gptqmodel", "auto-round", "none"])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200, help="of AutoRound")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = load_file(options.tokens)
    chunks = {kind: [tokens[name] for name in sorted(tokens) if name[0] == kind] for kind in "ch"}
    job = (options.model, torch.cat(chunks["c"]), options.bits, options.group_size)
    start = time.perf_counter()
    weights = {
        "llm-compressor": lambda: llm_compressor(*job),
        "gptqmodel": lambda: gptqmodel(*job),
        "auto-round": lambda: auto_round(*job, options.iters),
        "none": dict,
    }[options.tool]()
    wall_s, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = perplexity(options.model, weights, torch.cat(chunks["h"])) if chunks["h"] else None
    print(json.dumps({"tool": options.tool, "perplexity": value, "wall_s": round(wall_s, 1), "peak_bytes": peak}))


if __name__ == "__main__":
    main()
