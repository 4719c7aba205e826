"""Checkpoints of true sizes that take no disk: headers of safetensors files whose tensors are holes."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["write_sparse_checkpoint"]


def write_sparse_checkpoint(folder: Path, config: Any) -> Path:
    """Write a checkpoint of bfloat16 of which only the headers are there, and return its folder.

    Args:
        folder: Folder that is made.
        config: Config of the model, of transformers.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * math.prod(tensor.shape)
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config.save_pretrained(folder)
    return folder
