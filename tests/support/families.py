"""The families of models that are tested, each with a writer of a tiny checkpoint, and the whole way of a checkpoint.

A family is an architecture in one layout of its files: in 16 or 32 bits, quantized already, with a vision tower, with
layers for multi-token prediction.
"""

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from astro.errors import UnsupportedError
from astro.model.model_class import text_model
from astro.model.model_config import load_config
from astro.storage.atomic import read_json, write_json
from astro.storage.checkpoint import INDEX_NAME, Checkpoint
from astro_dist import pipeline
from astro_dist.config.schema import RunConfig
from astro_dist.planning.coverage import Coverage
from astro_dist.run_directory.summary import Summary
from tests.support.architectures import DENSE, EXPERTS, IDS, STATEFUL, streamed_logits
from tests.support.dequantized import write_dequantized
from tests.support.models import LLAMA, write_checkpoint
from tests.support.quantized_sources import SOURCES, write_source
from tests.support.wrappers import WITH_DRAFTER, WRAPPERS, write_model

__all__ = ["ENCODED_MODELS", "FAMILIES", "GROUP_SIZE", "UNREADABLE", "Examined", "examine"]

GROUP_SIZE = 32
"""Columns that share a scale; vLLM asks for at least as many."""
ENCODED_MODELS = {"mxfp4": EXPERTS["gpt-oss"], "int4": EXPERTS["deepseek-v3"], "nvfp4": EXPERTS["qwen3-moe"]}
"""Configurations of the models that are stored in a kind of source; the others are Llamas."""

_NO_CONVERTER = "its class reads experts of the source's layout, and no packed ones"
UNREADABLE = {
    "gpt2": "Conv1D",
    "falcon": "its linear layers multiply by `weight` themselves",
    "gpt-oss": _NO_CONVERTER,
    "hy-v4": _NO_CONVERTER,
    "source-mxfp4": _NO_CONVERTER,
    "longcat-flash": "it asks for weights of experts that have none in files for servers",
}
"""Families whose packed weights transformers cannot read, with the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """Holds what became of a checkpoint. What could not be found out is None, and `failures` says why.

    Attributes:
        layout: Encodings of the source's weights, or the dtype of most of them.
        streamed: Largest difference of logits between the model streamed block by block and the whole model.
        model: Folder of the result.
        coverage: Which weights are packed.
        missing: Names that the class of `architectures` misses in the result and not in the source.
        unexpected: Names that it does not know in the result, but for those that it does not know in the source.
        difference: Largest difference of logits between the result as transformers reads it and the dequantized
            weights, over the largest logit.
        failures: First line of the error of each step that failed, by the name of the attribute.
    """

    layout: str | None
    streamed: float | None
    model: Path | None
    coverage: Coverage | None
    missing: Set[str] | None
    unexpected: Set[str] | None
    difference: float | None
    failures: Mapping[str, str]


def _writer(config: Any) -> Callable[[Path], Path]:
    return lambda folder: write_checkpoint(folder, config)


def _wrapper_writer(name: str) -> Callable[[Path], Path]:
    return lambda folder: write_model(folder, name)


def _source_writer(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        config = ENCODED_MODELS.get(kind) or transformers.LlamaConfig(**LLAMA)
        beside = folder.parent
        model = write_checkpoint(beside / "in-16-bits", config, torch.bfloat16)
        write_source(model, kind, folder, beside / "decoded-by-the-test")
        return folder

    return write


FAMILIES: dict[str, Callable[[Path], Path]] = {
    **{name: _writer(config) for name, config in {**DENSE, **EXPERTS, **STATEFUL}.items()},
    **{f"images-{name}": _wrapper_writer(name) for name in WRAPPERS},
    **{f"drafter-{name}": _wrapper_writer(name) for name in WITH_DRAFTER if name not in WRAPPERS},
    **{f"source-{kind}": _source_writer(kind) for kind in SOURCES},
}
"""Functions that write a family's tiny checkpoint to a folder and return the folder, by name of the family."""


def examine(source: Path, scratch: Path) -> Examined:
    """Stream a checkpoint, quantize it, read the result with transformers, and compare it with our own reading.

    The source is streamed in float32. The result is read in the dtype that config.json names, because transformers
    unpacks experts in that of their scales, whatever it is asked for.

    A step that fails does not end the others, but for those that need its result.

    Args:
        source: Folder of the checkpoint.
        scratch: Folder that gets the run and whatever else is written.
    """
    failures: dict[str, str] = {}

    def attempt(step: str, function: Callable[..., Any], *inputs: Any) -> Any:
        if any(value is None for value in inputs):
            return None
        try:
            return function(*inputs)
        except Exception as error:  # whatever transformers or the run raise belongs in the table
            failures.setdefault(step, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            return None

    layout = attempt("layout", _layout_of, source)
    plain = attempt("layout", _decoded, source, scratch / "plain")
    original = attempt("streamed", _load, plain)
    streamed = attempt("streamed", _streamed_difference, source, scratch, original)
    summary = attempt("coverage", _quantize, source, scratch / "run")
    model = Path(summary.model) if summary else None
    result = attempt("missing", _load, model, "auto")
    missing = unexpected = None
    if result is not None:
        missing = frozenset(result.missing - (original.missing if original else set()))
        unexpected = frozenset(result.unexpected - (original.unexpected if original else set()))
    return Examined(
        layout=layout,
        streamed=streamed,
        model=model,
        coverage=summary.coverage if summary else None,
        missing=missing,
        unexpected=unexpected,
        difference=None if missing else attempt("difference", _difference, plain, model, scratch / "ours", result),
        failures=failures,
    )


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model as transformers loads it, its logits, and the names it misses or does not know."""

    logits: torch.Tensor
    missing: Set[str]
    unexpected: Set[str]


@torch.no_grad()
def _load(folder: Path, dtype: torch.dtype | str = torch.float32) -> _Loaded:
    name = read_json(folder / "config.json")["architectures"][0]
    if not hasattr(transformers, name):
        raise UnsupportedError(f"transformers {transformers.__version__} has no {name}")
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", output_loading_info=True, **_config_of(folder)
    )
    # The first forward of the whole model unpacks the weights. It may fail for want of images.
    with contextlib.suppress(Exception):
        model(input_ids=IDS[:, :1], use_cache=False)
    # Logits are in float32 whatever the weights are in: sums in another order may send tokens to other experts.
    torch.nn.Module.float(model)  # transformers refuses the method of the model where it was quantized
    missing = {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
    return _Loaded(text_model(model)(input_ids=IDS, use_cache=False).logits, missing, set(info["unexpected_keys"]))


def _config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration as an argument where transformers knows the class and not the name of its kind."""
    if read_json(folder / "config.json").get("model_type") in CONFIG_MAPPING:
        return {}
    return {"config": load_config(folder, trust_remote_code=False)}


def _layout_of(source: Path) -> str:
    checkpoint = Checkpoint.open_source(source)
    labels = Counter(weight.label for weight in checkpoint.encoded.weights)
    labels = labels or Counter(entry.dtype for entry in checkpoint.entries.values())
    return " and ".join(sorted(labels, key=lambda label: -labels[label])[: 3 if checkpoint.encoded.weights else 1])


def _decoded(source: Path, folder: Path) -> Path:
    """Return a folder with the source's weights in 16 bits; the source itself where they are."""
    checkpoint = Checkpoint.open_source(source)
    if not checkpoint.encoded.weights:
        return source
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    save_file(checkpoint.read(checkpoint.entries), folder / "model.safetensors", {"format": "pt"})
    config = read_json(source / "config.json")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        section.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    return folder


def _streamed_difference(source: Path, scratch: Path, original: _Loaded) -> float:
    streamed = streamed_logits(source, IDS, scratch, Checkpoint.open_source)
    return float((streamed - original.logits).abs().max())


def _quantize(source: Path, run: Path) -> Summary:
    config = {
        "model": {"source": str(source)},
        "quantization": {"group_size": GROUP_SIZE},
        "regularizer": {"name": "none"},
        "experts": {"min_tokens": 8},
        "calibration": {"samples": 6, "sequence_length": 48, "chunk_samples": 4, "holdout_samples": 2},
        "execution": {"executor": "local", "device": "cpu"},
        "output": {"dir": str(run)},
    }
    return pipeline.quantize(RunConfig.model_validate(config))


def _difference(plain: Path, model: Path, folder: Path, result: _Loaded) -> float:
    write_dequantized(plain, model, folder)
    ours = _load(folder, "auto").logits
    return float((result.logits - ours).abs().max() / ours.abs().max())
