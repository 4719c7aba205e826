"""Which transformers class a checkpoint is built as, and which part of that class text goes through.

A checkpoint names its class in `architectures` of config.json. A class that also takes images, video or sound is a
wrapper: it has a text decoder, whose blocks are quantized, and towers beside it, which text never enters.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from astro.errors import UnsupportedError
from astro.model.model_config import load_config
from astro.storage.atomic import read_json

__all__ = ["auto_class_of", "build_on_meta", "find_blocks", "names_beside_text", "text_model"]

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""transformers' auto classes whose models continue a text, in the order in which they are tried."""
_MAPPINGS: dict[str, dict[str, Any]] = {
    "AutoModelForCausalLM": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForImageTextToText": dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "AutoModelForMultimodalLM": dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
}
"""The names of the classes that each auto class builds, by `model_type`."""


def build_on_meta(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Build the model that a folder's config.json describes, on the meta device.

    The class is the one that `architectures` names, if transformers has it and it continues a text; otherwise the
    first that an auto class gives.

    Args:
        folder: A local folder with the files of the checkpoint that are not weights.
        dtype: Dtype of the parameters.
        trust_remote_code: Whether code that the checkpoint ships may run.

    Raises:
        UnsupportedError: transformers has no model for it that continues a text.
        CheckpointError: config.json is missing or no JSON object.
    """
    content = read_json(folder / "config.json", if_missing="a checkpoint folder must hold it")
    try:
        config = load_config(folder, trust_remote_code)
        with torch.device("meta"):
            model = _from_config(config, dtype, trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        hint = (
            " It ships its own code, which runs only with model.trust_remote_code: true, or with --trust-remote-code."
            if "auto_map" in content
            else ""
        )
        raise UnsupportedError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no causal language model for "
            f"model_type {content.get('model_type')!r}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__:.300}.{hint}"
        ) from error
    model.tie_weights()
    return model.eval()


def auto_class_of(model: Any) -> str:
    """Return the name of the auto class with which a user of transformers loads a model.

    Args:
        model: The model, of a class of transformers or of the checkpoint's own code.
    """
    name, kind = type(model).__name__, model.config.model_type
    # A wrapper may be entered for causal language models too, but images want the class that takes them.
    names = reversed(_AUTO_CLASSES[:2]) if _is_wrapper(model) else _AUTO_CLASSES[:2]
    return next((auto for auto in (*names, _AUTO_CLASSES[2]) if _builds(auto, kind, name)), "AutoModelForCausalLM")


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the list of transformer blocks that text goes through, and its name in the model.

    Only the text decoder is looked at: a vision tower may happen to have as many blocks. Where the decoder itself holds
    a tower, as in IDEFICS, that one's blocks lie deeper.

    Args:
        model: The model.

    Raises:
        UnsupportedError: The model has an encoder for text, or no list in the text decoder has as many modules as the
            config tells.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__}: is an encoder with a decoder, whose blocks do not follow each other; give a "
            "model that is a decoder alone"
        )
    # Of LongCat's blocks each counts as two layers, and its config tells the number of blocks too.
    counts = [getattr(config, "num_hidden_layers", None), getattr(config, "num_layers", None)]
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in inside]
    lists.sort(key=lambda named: named[0].count("."))
    for count in counts:
        for name, module in lists:
            if len(module) == count:
                return name, module
    raise UnsupportedError(
        f"{type(model).__name__}: no list of {counts[0]} transformer blocks found in its text decoder"
    )


def text_model(model: Any) -> Any:
    """Return the innermost model that holds both the text decoder and the head: mostly the model itself.

    Some wrappers hold a whole causal language model. Text goes through that one alone, and what the wrapper adds for
    images cannot fail then.

    Args:
        model: The model.
    """
    head = model.get_output_embeddings()
    if head is None:
        return model
    innermost = model
    needed = {id(head), id(model.get_decoder())}
    for module in model.modules():  # outer modules come first
        if isinstance(module, PreTrainedModel) and needed <= {id(part) for part in module.modules()}:
            innermost = module
    return innermost


def names_beside_text(model: Any) -> tuple[str, ...]:
    """Return the names of the modules of a wrapper that no text goes through; empty for a plain language model.

    These are the vision tower, the projector and the like: whatever lies beside the text decoder and holds neither
    the head nor the embeddings of tokens.

    Args:
        model: The model.

    Raises:
        UnsupportedError: The model does not say which of its parts text goes through.
    """
    if not _is_wrapper(model):
        return ()
    try:
        needed = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{type(model).__name__}: does not say which of its parts text goes through ({error}); give the language "
            "model inside it as a checkpoint of its own"
        ) from error
    wanted = {id(module) for part in needed if part is not None for module in part.modules()}
    return tuple(_apart(model, "", wanted))


def _apart(module: nn.Module, prefix: str, wanted: set[int]) -> list[str]:
    """List the largest modules inside a module, or itself, in which nothing is wanted."""
    if id(module) in wanted:
        return []
    if not any(id(part) in wanted for part in module.modules()):
        return [prefix]
    children = ((f"{prefix}.{name}" if prefix else name, child) for name, child in module.named_children())
    return [name for child_name, child in children for name in _apart(child, child_name, wanted)]


def _from_config(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    asked = {"dtype": dtype, "experts_implementation": "eager"}
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:  # the checkpoint's own code names its class
        auto = next((name for name in _AUTO_CLASSES if name in auto_map), _AUTO_CLASSES[0])
        return getattr(transformers, auto).from_config(config, trust_remote_code=True, **asked)
    for name in config.architectures or ():
        if any(_builds(auto, config.model_type, name) for auto in _AUTO_CLASSES):
            return getattr(transformers, name)._from_config(config, **asked)
    autos = [auto for auto in _AUTO_CLASSES if config.model_type in _MAPPINGS[auto]]
    # Unless it is told so, transformers asks at the terminal whether the checkpoint's own code may run.
    auto = getattr(transformers, autos[0] if autos else _AUTO_CLASSES[0])
    return auto.from_config(config, trust_remote_code=trust_remote_code, **asked)


def _builds(auto: str, model_type: str, name: str) -> bool:
    """Tell whether an auto class builds the class of a name for models of a type."""
    names = _MAPPINGS[auto].get(model_type)
    return name == names if isinstance(names, str) else name in (names or ())


def _is_wrapper(model: Any) -> bool:
    return model.config.get_text_config() is not model.config
