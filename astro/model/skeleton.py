"""A model without weights, from its own transformers class; parts of it are filled from checkpoint tensors.

transformers' internal loading functions are used here and nowhere else: they map checkpoint names to module names and
convert layouts, so that a lone block equals the same block of the whole model for any architecture transformers knows.
"""

import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from astro.errors import CheckpointError, UnsupportedError
from astro.model.experts import expert_layers, expert_owners, has_biases, is_gate, num_experts
from astro.model.linear_layer import LinearLayer
from astro.storage.atomic import read_json

__all__ = ["Skeleton"]


class Skeleton:
    """The model of a checkpoint without weights, its list of blocks, and which checkpoint tensors fill what.

    Attributes:
        model: The causal language model, on the meta device but for the parts that are loaded.
        blocks: The transformer blocks of the model.
        blocks_name: Name of the list of blocks in the model, e.g. "model.layers".
    """

    def __init__(self, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        """Build the skeleton from a folder's config.json.

        Args:
            folder: A local folder with the files of the checkpoint that are not weights.
            dtype: Dtype that loaded parameters get.
            trust_remote_code: Whether code that the checkpoint ships may run.

        Raises:
            UnsupportedError: transformers has no causal language model for it, or its blocks cannot be found.
            CheckpointError: config.json is missing or wrong.
        """
        self.model = _build_on_meta(folder, dtype, trust_remote_code)
        self.blocks_name, self.blocks = _find_blocks(self.model)
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._mapping: list[WeightConverter | WeightRenaming] = [*self._renamings, *self._converters]
        self._dtype = dtype
        self._state = dict(self.model.state_dict())

    def target_of(self, key: str) -> tuple[str, str | None]:
        """Return what the model calls a checkpoint tensor, and the pattern of its conversion; None without conversion.

        Args:
            key: Name of the checkpoint tensor.
        """
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = rename_source_key(key, [], [], prefix, self._state)
        return name, pattern

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter or buffer of the model; None where it has no such tensor.

        Args:
            name: Name of the parameter or buffer in the model.
        """
        tensor = self._state.get(name)
        return None if tensor is None else tuple(tensor.shape)

    def block_of(self, name: str) -> int | None:
        """Return the index of the block that a name belongs to; None outside the blocks and beyond the last.

        Args:
            name: Name of a module or tensor in the model.
        """
        head, _, tail = name.partition(f"{self.blocks_name}.")
        index = tail.split(".", 1)[0]
        return int(index) if not head and index.isdigit() and int(index) < len(self.blocks) else None

    def linear_layers(self, index: int, keys: Sequence[str]) -> tuple[list[LinearLayer], list[str]]:
        """Return the linear layers of a block, and the matrices in it that are none.

        Args:
            index: Index of the block.
            keys: Names of the block's checkpoint tensors.

        Returns:
            The linear layers in the model's order, and the model's names of all other matrices, which stay as they
            are. Routers and other gates are among these.

        Raises:
            UnsupportedError: Experts are held in a layout that is not known.
            CheckpointError: A weight is missing from the checkpoint.
        """
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}"
        plain, converted = self._targets(keys)
        filled = plain.keys() | converted.keys()
        layers: list[LinearLayer] = []
        others: list[str] = []
        experts, owners = num_experts(block), expert_owners(block, prefix)
        for name, module in block.named_modules(prefix=prefix):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                target = f"{name}.{parameter_name}"
                if parameter.ndim == 3 and experts and len(parameter) == experts:
                    layers += expert_layers(name, module, parameter_name, converted.get(target, {}), plain)
                elif target not in filled and not has_biases(name, module, parameter_name, plain):
                    raise CheckpointError(f"the checkpoint has no tensor for {target} of {type(self.model).__name__}")
                elif parameter.ndim < 2 or (experts and parameter_name.endswith("_bias")):
                    continue
                elif isinstance(module, nn.Linear) and target in plain and not is_gate(name, module, experts, owners):
                    layers.append(LinearLayer.plain(name, plain[target], *parameter.shape))
                elif isinstance(module, Conv1D) and target in plain:
                    columns, rows = parameter.shape
                    layers.append(LinearLayer.plain(name, plain[target], rows, columns, transposed=True))
                elif parameter.ndim > 2 and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    raise UnsupportedError(
                        f"{target} is a {type(module).__name__} parameter of shape {list(parameter.shape)}: experts in "
                        "a layout that is not known here"
                    )
                else:
                    others.append(target)
        return layers, others

    def _targets(self, keys: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[tuple[int, int], str]]]:
        """Return the checkpoint tensor of each of the model's names, and those that are converted by their places."""
        plain: dict[str, str] = {}
        converted: dict[str, dict[tuple[int, int], str]] = {}
        for key in keys:
            target, pattern = self.target_of(key)
            if pattern is None:
                plain[target] = key
            else:
                converted.setdefault(target, {})[self._place(key, pattern)] = key
        return plain, converted

    def _place(self, key: str, pattern: str) -> tuple[int, int]:
        """Return which expert, and which layer in a parameter, a converted tensor is, where many become a parameter."""
        number = next(e.source_patterns.index(pattern) for e in self._converters if pattern in e.source_patterns)
        match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
        return (int(match.group(1)) if match and match.groups() else 0), number

    def load(self, part: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Fill a part of the model from checkpoint tensors, in place. None of its parameters asks for a gradient.

        Args:
            part: The model or one of its blocks.
            tensors: Tensors by checkpoint name; all that the part needs must be among them.
            device: Device that the part is put on.

        Raises:
            CheckpointError: A tensor has the wrong shape, or a parameter got no tensor.
        """
        self._fill_buffers(part, device)
        config = LoadStateDictConfig(
            device_map={"": device}, dtype=self._dtype, weight_mapping=self._mapping, ignore_mismatched_sizes=False
        )
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), config, None)
        except RuntimeError as error:
            raise CheckpointError(f"loading {type(self.model).__name__}: {error}") from error
        problems = [str(entry) for entry in (*info.mismatched_keys, *info.conversion_errors.items(), *info.error_msgs)]
        if problems:
            raise CheckpointError(
                f"a tensor does not fit {type(self.model).__name__}: {problems[0]:.300}; config.json and the shards "
                "are of different models"
            )
        part.requires_grad_(False)

    def require_covered(self, targets: Set[str]) -> None:
        """Refuse a checkpoint that leaves a parameter outside the blocks without a tensor.

        Args:
            targets: The model's names of all tensors that the checkpoint holds.

        Raises:
            CheckpointError: No tensor fills a parameter, and it is not tied to another; the message names the first.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, _ in self.model.named_parameters():
            covered = name in targets or (name in tied and tied[name] in targets)
            if self.block_of(name) is None and not covered:
                raise CheckpointError(f"the checkpoint has no tensor for {name} of {type(self.model).__name__}")

    def tie(self) -> None:
        """Tie weights as transformers does when it loads: not where the checkpoint holds both, with other values."""
        tied = self.model.all_tied_weights_keys
        missing = {name for name in (*tied, *tied.values()) if self.model.get_parameter(name).is_meta}
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def limits(self) -> tuple[int, int | None]:
        """Return the size of the vocabulary, and the longest sequence that the model has positions for.

        The latter is None where the model's config does not say.
        """
        config = self.model.config.get_text_config()
        return int(config.vocab_size), getattr(config, "max_position_embeddings", None)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that pass from block to block."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def expert_share(self) -> float:
        """Share of the tokens that reaches an expert; 1 without experts, and where the model's config does not say."""
        counts = (num_experts(block) for block in self.blocks)
        experts = next((count for count in counts if count), None)
        chosen = getattr(self.model.config.get_text_config(), "num_experts_per_tok", None)
        return chosen / experts if experts and chosen else 1.0

    def require_filled(self, part: nn.Module, name: str) -> None:
        """Refuse a part of the model in which something is still without weights.

        Args:
            part: The model or one of its blocks.
            name: What messages call the part.

        Raises:
            CheckpointError: A parameter or buffer is empty; the message names the first.
        """
        for tensor_name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if tensor.is_meta:
                raise CheckpointError(f"{name}: the checkpoint holds no tensor for {tensor_name} of this model")

    def _fill_buffers(self, part: nn.Module, device: torch.device) -> None:
        # Buffers that no file holds (rotary frequencies) are computed by the model's own initializer.
        for module in part.modules():
            buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            empty = {name: buffer for name, buffer in buffers.items() if buffer is not None and buffer.is_meta}
            for name, buffer in empty.items():
                module._buffers[name] = torch.empty_like(buffer, device=device)
            if empty:
                self.model._init_weights(module)


def _build_on_meta(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    content = read_json(folder / "config.json", if_missing="a checkpoint folder must hold it")
    kind = content.get("model_type")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="eager"
            )
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        hint = (
            " It ships its own code, which runs only with model.trust_remote_code: true."
            if "auto_map" in content
            else ""
        )
        raise UnsupportedError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} has no causal language model for "
            f"model_type {kind!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__:.300}.{hint}"
        ) from error
    model.tie_weights()
    return model.eval()


def _find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UnsupportedError(f"{type(model).__name__}: no list of {count} transformer blocks found in it")
