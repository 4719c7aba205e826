"""What the regularization alone costs: the perplexity of weights that are regularized and not quantized.

    python tests/bench/regularized.py RUN

RUN is the directory of a finished run in mode `blocks` with one round, whose source is a local folder. Each layer is
regularized with the β that the run chose for it. The paper reports a loss of at most 0.02, at perplexities of 3.3 to
5.5 (arXiv 2602.07596, Table 2).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from layers import hessians
from peers import perplexity_of

from astro.config import Regularizer
from astro.quantization.regularizer import mean_group_maximum, prepare, regularize


@torch.no_grad()
def regularize_model(model: torch.nn.Module, layers: list[dict], tokens: dict, settings: dict) -> None:
    """Replace the weights of every layer by their regularized form, which inputs of the source model decide."""
    firsts = {layer["name"].split("+")[0]: layer for layer in layers}
    sums = hessians(model, tokens, list(firsts), "c")
    for name, layer in firsts.items():
        modules = [model.get_submodule(member) for member in layer["name"].split("+")]
        W, H = torch.cat([module.weight.float() for module in modules]), sums.pop(name)
        regularizer = Regularizer(**{**settings, "beta": layer["beta"]})
        problem = prepare(H, mean_group_maximum(W, layer["group_size"]), regularizer, layer["group_size"], [name])
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
    held_out = torch.cat([tokens[name] for name in sorted(tokens) if name.startswith("h")])
    source = config["model"]["source"]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    before = perplexity_of(model, held_out)
    regularize_model(model, layers, tokens, config["regularizer"])
    after = perplexity_of(model, held_out)
    print(f"original {before:.4f}, regularized and not quantized {after:.4f}: {100 * (after / before - 1):+.3f} %")


if __name__ == "__main__":
    main()
