"""What each part of the solve gains: its seconds, and layer errors on held-out tokens, over some blocks of a model.

    python tests/bench/layers.py MODEL RUN/tokens.safetensors --bits 3 --group-size 64 --blocks 5 17 27

Inputs come from the source model: the chunks `c*` calibrate, and the errors are those on the chunks `h*`. Tokens are
weighted by their norm, or count alike with `--token-weights none`, in both. It prints Markdown. The first table has the
geometric mean of the held-out layer error over all input groups, relative to the first row, and the seconds of all of
them together. Then follows how `beta: auto` changed the layer error of whole groups on the calibration tokens, relative
to β = 0, at worst and at best.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from astro.calibration.hessian import HessianAccumulator
from astro.calibration.token_weights import norm_weights
from astro.config import Quantization, Regularizer
from astro.linalg.symmetric import layer_error
from astro.quantization.input_group import quantize_input_groups
from astro.quantization.recipe import InputMoments, Recipe

NONE, AUTO = Regularizer(name="none"), Regularizer()
PLAIN = {"scale_search": "mse", "signed_scales": False, "refine_passes": 0}
METHODS = {
    "GPTQ, scales by MSE": (PLAIN, NONE),
    "GPTQ, min-max scales": ({**PLAIN, "scale_search": "minmax"}, NONE),
    "the same after Astro, beta auto": ({**PLAIN, "scale_search": "minmax"}, AUTO),
    "GPTQ, scales by the Hessian": ({**PLAIN, "scale_search": "hessian"}, NONE),
    "and signed": ({"refine_passes": 0}, NONE),
    "and refined": ({}, NONE),
    "and after Astro, beta auto: the default": ({}, AUTO),
    "the default, scales by MSE": ({"scale_search": "mse"}, AUTO),
    "the default, scales not signed": ({"signed_scales": False}, AUTO),
    "the default, not refined": ({"refine_passes": 0}, AUTO),
}

PAIRS = [
    ("GPTQ, min-max scales", "the same after Astro, beta auto"),
    ("and refined", "and after Astro, beta auto: the default"),
]


class NaiveHessian:
    """The weighted mean of xxᵀ as it is, which judges what was made with a Hessian that is shrunk."""

    def __init__(self, num_columns: int) -> None:
        """Begin with no token."""
        self._sum, self._total = torch.zeros(num_columns, num_columns), 0.0

    def add_(self, X: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Add inputs [..., C] with a weight for each."""
        X = X.reshape(-1, X.shape[-1])
        weights = torch.ones(len(X)) if weights is None else weights
        self._sum += (X * weights.unsqueeze(-1)).T @ X
        self._total += float(weights.sum())

    def finish_(self, _: str) -> torch.Tensor:
        """Return the mean."""
        return self._sum / self._total


@torch.no_grad()
def hessians(model: torch.nn.Module, tokens: dict, sums: dict, kind: str, weighted: bool) -> dict:
    """Compute the mean of xxᵀ for the inputs of some layers, from chunks whose names begin with `kind`."""

    def add(total: HessianAccumulator | NaiveHessian, X: torch.Tensor) -> None:
        total.add_(X, norm_weights(X.reshape(-1, X.shape[-1])) if weighted else None)

    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, total=total: add(total, args[0]))
        for n, total in sums.items()
    ]
    for name in sorted(tokens):
        if name.startswith(kind):
            model.base_model(tokens[name])
    for handle in handles:
        handle.remove()
    return {name: total.finish_(name) for name, total in sums.items()}


def held_out_error(members: dict, weights: dict, H: torch.Tensor) -> float:
    """Compute the relative layer error under the Hessian of held-out tokens."""
    error = sum(float(layer_error(weights[n].float(), members[n].dequantize(), H).sum()) for n in weights)
    return error / sum(float(layer_error(W.float(), torch.zeros_like(W.float()), H).sum()) for W in weights.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 17, 27])
    parser.add_argument("--token-weights", choices=["norm", "none"], default="norm")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokens = load_file(options.tokens)
    parts = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
             ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
    groups = [[f"model.layers.{b}.{name}" for name in part] for b in options.blocks for part in parts]
    columns = {group[0]: model.get_submodule(group[0]).in_features for group in groups}
    known = {name: HessianAccumulator(count, torch.device("cpu")) for name, count in columns.items()}
    naive = {name: NaiveHessian(count) for name, count in columns.items()}
    weighted = options.token_weights == "norm"
    calibration = hessians(model, tokens, known, "c", weighted)
    judge = hessians(model, tokens, naive, "h", weighted)
    logs, seconds, records = {}, {}, {}
    for method in options.methods:
        changes, regularizer = METHODS[method]
        settings = Quantization(**{"bits": options.bits, "group_size": options.group_size, **changes})
        for group in groups:
            weights = {name: model.get_submodule(name).weight.detach() for name in group}
            inputs = InputMoments(calibration[group[0]][None])
            scheme = settings.scheme(group[0], inputs.H.shape[-1])
            recipe = Recipe(settings, regularizer, torch.float16)
            members, (record,) = quantize_input_groups([weights], inputs, [1], scheme, recipe)
            records.setdefault(method, []).append(record)
            logs.setdefault(method, []).append(math.log(held_out_error(members, weights, judge[group[0]])))
            seconds[method] = seconds.get(method, 0.0) + sum(record.seconds.values())
    print(f"| {options.bits} bits, group {options.group_size} | held-out layer error | seconds |\n|---|---|---|")
    for method, values in logs.items():
        first = next(iter(logs.values()))
        ratio = math.exp(sum(value - other for value, other in zip(values, first, strict=True)) / len(values))
        print(f"| {method} | {ratio:.3f} | {seconds[method]:.1f} |")
    print(f"\nlayer error with β auto / β = 0, {len(groups)} groups")
    for without, within in (pair for pair in PAIRS if set(pair) <= set(options.methods)):
        pairs = list(zip(records[without], records[within], strict=True))
        ratios = sorted(auto.relative_error / none.relative_error for none, auto in pairs)
        used, middle = sum(auto.beta > 0 for _, auto in pairs), ratios[len(ratios) // 2]
        print(f"{within}: worst {ratios[-1]:.4f}, median {middle:.4f}, best {ratios[0]:.4f}; β > 0 in {used}")


if __name__ == "__main__":
    main()
