"""Logits of a quantized model as plain transformers reads it, in whatever environment has the reader of its format.

    PYTHON tests/consumers/read_logits.py MODEL TOKENS.safetensors LOGITS.safetensors

Float32 on the CPU. Prints, as one JSON object, what was missing or too much and who read it.
"""

import importlib.metadata
import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def main() -> None:
    """Load, run, write."""
    model_folder, tokens, logits = sys.argv[1:]
    settings = transformers.AutoConfig.from_pretrained(model_folder).quantization_config
    reader = {"gptq": "gptqmodel"}.get(settings["quant_method"], settings["quant_method"])
    options = {}
    if reader == "gptqmodel":  # its default kernel computes in bfloat16
        options["quantization_config"] = transformers.GPTQConfig(bits=settings["bits"], backend="torch")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, output_loading_info=True, **options
    )
    with torch.no_grad():
        save_file({"logits": model(load_file(tokens)["tokens"]).logits.contiguous()}, logits)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", reader)}
    print(json.dumps({"problems": {name: sorted(map(str, keys)) for name, keys in info.items() if keys}, **versions}))


if __name__ == "__main__":
    main()
