"""The config of a checkpoint as transformers' own class reads it, also where the checkpoint calls it otherwise."""

from pathlib import Path
from typing import Any

import transformers

from astro.storage.atomic import read_json

__all__ = ["load_config"]

_SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Values of `model_type` that transformers does not know, of models that it knows under another."""


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """Read a folder's config.json.

    Args:
        folder: A local folder with the files of the checkpoint that are not weights.
        trust_remote_code: Whether code that the checkpoint ships may run. It does not run where transformers has the
            model itself under another name.

    Raises:
        CheckpointError: config.json is missing or no JSON object.
    """
    content = read_json(folder / "config.json", if_missing="a checkpoint folder must hold it")
    native = _SAME_AS.get(str(content.get("model_type")))
    if native is None:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    known = {key: value for key, value in content.items() if key not in ("model_type", "auto_map")}
    return type(transformers.AutoConfig.for_model(native)).from_dict(known)
