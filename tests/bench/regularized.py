"""What the regularization alone costs: perplexity of regularized but unquantized weights, at the β that a run chose.

    python tests/bench/regularized.py RUN

RUN is the directory of a finished run in mode `blocks` with one round, its source a local folder. The paper reports at
most 0.02 of 3.3 to 5.5 (arXiv 2602.07596, Table 2).
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file

from astro.config import Regularizer
from astro.hessian import HessianAccumulator
from astro.regularizer import mean_group_maximum, prepare, regularize


@torch.no_grad()
def perplexity(model: torch.nn.Module, sequences: torch.Tensor) -> float:
    """Of held-out sequences."""
    total = 0.0
    for row in sequences:
        logits = model(row[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / sequences[:, 1:].numel())


@torch.no_grad()
def regularize_model(model: torch.nn.Module, layers: list[dict], sequences: torch.Tensor, settings: dict) -> None:
    """Replace every layer's weights by their regularized form, from the source model's own inputs."""
    firsts = {layer["name"].split("+")[0]: layer for layer in layers}
    sums = {name: HessianAccumulator(layer["columns"], torch.device("cpu")) for name, layer in firsts.items()}
    for name, accumulator in sums.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, accumulator=accumulator: accumulator.add_(args[0]))
    for chunk in sequences.split(8):
        model.base_model(chunk)
    for name, layer in firsts.items():
        modules = [model.get_submodule(member) for member in layer["name"].split("+")]
        W, H = torch.cat([module.weight.float() for module in modules]), sums.pop(name).finish_(name)
        own = Regularizer(**{**settings, "beta": layer["beta"]})
        problem = prepare(H, mean_group_maximum(W, layer["group_size"]), own, layer["group_size"], name)
        parts = regularize(W, problem, layer["beta"]).split([len(module.weight) for module in modules])
        for module, part in zip(modules, parts, strict=True):
            module.weight.copy_(part)


def main() -> None:
    """Print both perplexities and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    config = yaml.safe_load((run / "config.yaml").read_text())
    records = sorted((run / "records").glob("round-0-block-*.json"))
    layers = [layer for path in records for layer in json.loads(path.read_text())["result"]["layers"]]
    tokens = load_file(run / "tokens.safetensors")
    kinds = {kind: torch.cat([tokens[name] for name in sorted(tokens) if name[0] == kind]) for kind in "ch"}
    source = config["model"]["source"]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    before = perplexity(model, kinds["h"])
    regularize_model(model, layers, kinds["c"], config["regularizer"])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    after = perplexity(model, kinds["h"])
    print(f"original {before:.4f}, regularized and not quantized {after:.4f}: {100 * (after / before - 1):+.3f} %")


if __name__ == "__main__":
    main()
