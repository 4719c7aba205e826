"""What the config.json of a quantized source says about how its weights are stored.

Only the configuration tells the block that shares a scale: from the numbers of rows and of scales it cannot be told
where the last block is partial.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from astro.errors import CheckpointError, UnsupportedError

__all__ = ["SourceQuantization", "WeightScheme", "read_quantization", "without_quantization"]

_KEYS = ("quantization_config", "compression_config")
_FORMATS = (
    "dense", "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "mixed",
)  # fmt: skip
"""Formats of compressed-tensors that are decoded."""
MX_GROUP = 32
"""Numbers that share a scale in the formats whose names begin with MX, by their definition."""
NVFP4_GROUP = 16
"""Numbers that share a scale in NVFP4, by its definition."""


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """How the weights of some layers are stored.

    Attributes:
        bits: Bits of a number; None where the dtype of the stored tensor tells them.
        block: Rows and columns that share a scale; None for a scale by tensor, row or column.
        symmetric: Whether zero is the same number in all blocks, so that no zero points are stored.
    """

    bits: int | None
    block: tuple[int, int] | None
    symmetric: bool = True


@dataclasses.dataclass(frozen=True)
class SourceQuantization:
    """How a source is quantized.

    Attributes:
        method: What the configuration calls the method, e.g. "fp8".
        schemes: Schemes with the targets that the configuration names for each: names of modules, patterns behind
            `re:`, and names of classes. A scheme without targets is for all layers.
    """

    method: str
    schemes: tuple[tuple[tuple[str, ...], WeightScheme], ...]

    def scheme_of(self, module: str) -> WeightScheme:
        """Return the scheme of a layer.

        Args:
            module: Name of the layer in the checkpoint.

        Raises:
            CheckpointError: No scheme is for this layer.
        """
        # In the order of compressed-tensors, whichever group comes first. Encoded layers are of the class Linear.
        for fits in (_is_name, _is_pattern, _is_linear, _is_class):
            for targets, scheme in self.schemes:
                if any(fits(target, module) for target in targets):
                    return scheme
        for targets, scheme in self.schemes:
            if not targets:
                return scheme
        raise CheckpointError(f"config.json: no config group of its quantization_config is for {module}")


def read_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any]) -> SourceQuantization | None:
    """Read how a source is quantized.

    Args:
        config: Content of the source's config.json. The model's own settings may lie inside, e.g. in `text_config`.
        hf_quant_config: Content of hf_quant_config.json, where ModelOpt says it; empty where there is no such file.

    Returns:
        How it is quantized; None where the configuration says nothing of it.

    Raises:
        CheckpointError: It is quantized by a method that is not decoded, or the configuration is incomplete.
    """
    sections = list(_sections(config))
    if not sections and isinstance(hf_quant_config.get("quantization"), dict):
        sections = [{"quant_method": "modelopt", **hf_quant_config["quantization"]}]
    if not sections:
        return None
    if any(section != sections[0] for section in sections):
        raise UnsupportedError("config.json: holds several quantization_config that differ; give the original model")
    try:
        return _parse(sections[0])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json: its quantization_config is incomplete: {error!r}") from error


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without any word on quantization, also where it is inside a section.

    Args:
        config: Content of config.json.
    """
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and key in _KEYS:
            if value:
                yield value
        elif isinstance(value, dict):
            yield from _sections(value)


def _parse(section: Mapping[str, Any]) -> SourceQuantization:
    method = str(section.get("quant_method") or ("compressed-tensors" if "config_groups" in section else "none"))
    if method == "fp8":
        return SourceQuantization(method, (((), WeightScheme(8, _pair(section.get("weight_block_size")))),))
    if method == "fbgemm_fp8":
        return SourceQuantization(method, (((), WeightScheme(8, None)),))
    if method == "mxfp8":
        return SourceQuantization(method, (((), WeightScheme(8, (1, MX_GROUP))),))
    if method == "mxfp4":
        return SourceQuantization(method, (((), WeightScheme(4, (1, MX_GROUP))),))
    if method.startswith("modelopt"):
        block = (1, MX_GROUP) if section.get("quant_algo") == "MXFP8" else None
        return SourceQuantization(method, (((), WeightScheme(None, block)),))
    if method == "compressed-tensors":
        return SourceQuantization(method, tuple(_config_groups(section)))
    raise CheckpointError(
        f"config.json: the model is quantized already, by {method}, which is not decoded here; give the original "
        "16-bit checkpoint"
    )


def _config_groups(section: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], WeightScheme]]:
    sparse = (section.get("sparsity_config") or {}).get("format") or "dense"
    formats = {part.get("format") or "dense" for part in (section, *section["config_groups"].values())}
    unknown = sorted({*formats, sparse} - {*_FORMATS})
    if unknown or section.get("transform_config"):
        raise CheckpointError(
            f"config.json: the model is quantized already, by compressed-tensors in "
            f"{unknown[0] if unknown else 'a rotated basis (transform_config)'}, which is not decoded here; give the "
            "original 16-bit checkpoint"
        )
    for group in section["config_groups"].values():
        weights = group.get("weights")
        if weights:
            yield (
                tuple(group.get("targets") or ()),
                WeightScheme(int(weights["num_bits"]), _block(weights), weights.get("symmetric") is not False),
            )


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if group_size and group_size > 0 else "channel")
    if strategy in ("group", "tensor_group"):
        return 1, int(weights["group_size"])
    if strategy == "block":
        return _pair(weights["block_structure"])
    if strategy in ("tensor", "channel"):
        return None
    raise ValueError(f"strategy {strategy!r}")


def _pair(block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    rows, columns = block
    if not (int(rows) > 0 and int(columns) > 0):
        raise ValueError(f"block {block!r}")
    return int(rows), int(columns)


def _is_name(target: str, module: str) -> bool:
    """Tell whether a target is the name of a module; names in the checkpoint may have a longer prefix."""
    return module == target or module.endswith(f".{target}")


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def _is_linear(target: str, _: str) -> bool:
    return target == "Linear"


def _is_class(target: str, _: str) -> bool:
    """Tell whether a target names a class of modules, e.g. "FusedMoE"; names of modules are in lower case."""
    return target.isidentifier() and target[0].isupper()
