"""A model without weights, from its own transformers class; parts of it are filled from checkpoint tensors.

transformers' internal loading functions are used here and nowhere else: they map checkpoint names to module names and
convert layouts, so that a lone block equals the same block of the whole model for any architecture transformers knows.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from astro.errors import CheckpointError, UnsupportedError
from astro.model.computed_buffers import fill_buffers
from astro.model.conversions import Conversions
from astro.model.exact_layers import is_held_exact
from astro.model.experts import expert_layers, expert_owners, has_biases, is_gate, num_experts
from astro.model.linear_layer import LinearLayer
from astro.model.model_class import auto_class_of, build_on_meta, find_blocks, names_beside_text, text_model
from astro.model.zero_experts import cut_zero_experts, num_zero_experts, unread_keys
from astro.process import says_out_of_memory

__all__ = ["Skeleton"]


class Skeleton:
    """The model of a checkpoint without weights, its list of blocks, and which checkpoint tensors fill what.

    Attributes:
        model: The model, of the class that config.json names, on the meta device but for the parts that are loaded.
        text_model: The part of the model that makes logits of tokens; the model itself but in some wrappers.
        blocks: The transformer blocks of the model, or of its text decoder.
        parts_beside_text: Names of the largest modules that no text goes through, such as a vision tower.
        blocks_name: Name of the list of blocks in the model, e.g. "model.layers".
    """

    def __init__(self, folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
        """Build the skeleton from a folder's config.json.

        Args:
            folder: A local folder with the files of the checkpoint that are not weights.
            dtype: Dtype that loaded parameters get.
            trust_remote_code: Whether code that the checkpoint ships may run.

        Raises:
            UnsupportedError: transformers has no model for it that continues a text, or its blocks cannot be found.
            CheckpointError: config.json is missing or wrong.
        """
        self.model = build_on_meta(folder, dtype, trust_remote_code)
        self.blocks_name, self.blocks = find_blocks(self.model)
        self.text_model = text_model(self.model)
        self.parts_beside_text = names_beside_text(self.model)
        self._dtype = dtype
        self._cut = cut_zero_experts(self.model)
        self._state = dict(self.model.state_dict())
        self._cast: tuple[nn.Module, dict[str, torch.dtype]] | None = None
        mapping = get_model_conversion_mapping(self.model)
        self._conversions = Conversions(mapping, self.model.base_model_prefix, self._state)

    def target_of(self, key: str) -> tuple[str, str | None]:
        """Return what the model calls a checkpoint tensor, and the pattern of its conversion; None without conversion.

        Args:
            key: Name of the checkpoint tensor.
        """
        return self._conversions.target_of(key)

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

    def is_beside_text(self, name: str) -> bool:
        """Tell whether a module or tensor belongs to a part that no text goes through, such as a vision tower.

        Args:
            name: Name of the module or tensor in the model.
        """
        return any(name == part or name.startswith(f"{part}.") for part in self.parts_beside_text)

    def is_table(self, name: str) -> bool:
        """Tell whether a tensor is the weight of an embedding, from which rows are looked up.

        Args:
            name: Name of the tensor in the model.
        """
        module_name = name.rpartition(".")[0]
        return name in self._state and isinstance(self.model.get_submodule(module_name), nn.Embedding)

    @property
    def has_zero_experts(self) -> bool:
        """Whether experts pass their input on, and the model's class has weights for them that it does not read."""
        return bool(self._cut)

    def unread(self, keys: Iterable[str]) -> Set[str]:
        """Return which checkpoint tensors belong to experts that pass their input on: the model does not read them.

        Args:
            keys: Names of checkpoint tensors.
        """
        return unread_keys(self._cut, self._conversions.targets(list(keys), {}).converted) if self._cut else set()

    def num_zero_experts_in(self, target: str, shape: tuple[int, ...]) -> int:
        """Return how many experts that pass their input on have weights in a checkpoint tensor of all experts.

        Args:
            target: The model's name for the tensor.
            shape: Sizes of the checkpoint tensor.
        """
        expected = self.shape_of(target)
        is_longer = target in self._cut and expected is not None and shape[1:] == expected[1:]
        return max(shape[0] - self._cut[target], 0) if is_longer else 0

    @property
    def auto_class(self) -> str:
        """Name of the auto class with which a user of transformers loads the model."""
        return auto_class_of(self.model)

    def linear_layers(
        self, index: int, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[list[LinearLayer], list[str]]:
        """Return the linear layers of a block, and the matrices in it that are none.

        Args:
            index: Index of the block.
            keys: Names of the block's checkpoint tensors.
            shapes: Sizes of these tensors by name; None where none of them is turned.

        Returns:
            The linear layers in the model's order, and the model's names of all other matrices, which stay as they
            are. Among these are routers, other gates, and what servers hold in 16 bits.

        Raises:
            UnsupportedError: Experts are held in a layout that is not known.
            CheckpointError: A weight is missing from the checkpoint.
        """
        block, prefix = self.blocks[index], f"{self.blocks_name}.{index}"
        targets = self._conversions.targets(keys, shapes or {})
        plain, converted = targets.plain, targets.converted
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
                elif isinstance(module, nn.Linear) and target in plain and not self._is_exact(name, experts, owners):
                    layers.append(LinearLayer.plain(name, plain[target], *parameter.shape))
                elif isinstance(module, Conv1D) and target in plain:
                    columns, rows = parameter.shape
                    layers.append(LinearLayer.plain(name, plain[target], rows, columns, transposed=True))
                elif parameter.ndim > 2 and sum(size > 1 for size in parameter.shape) < 2:  # a vector all the same
                    continue
                elif parameter.ndim > 2 and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    raise UnsupportedError(
                        f"{target} is a {type(module).__name__} parameter of shape {list(parameter.shape)}: experts in "
                        "a layout that is not known here"
                    )
                else:
                    others.append(target)
        return [targets.as_stored(layer) for layer in layers], others

    def _is_exact(self, name: str, experts: int | None, owners: Set[str]) -> bool:
        """Tell whether a linear layer stays as it is: a gate, or a layer that servers hold in 16 bits."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        return is_held_exact(name, parent) or is_gate(name, self.model.get_submodule(name), experts, owners)

    def load(
        self,
        part: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fill a part of the model from checkpoint tensors, in place. None of its parameters asks for a gradient.

        Args:
            part: The model or one of its blocks.
            tensors: Tensors by checkpoint name; all that the part needs must be among them.
            device: Device that the part is put on.
            dtype: Dtype that all parameters get, until `unload`; that of the skeleton where not given.

        Raises:
            CheckpointError: A tensor has the wrong shape, or a parameter got no tensor.
            UnsupportedError: A buffer that no file holds is left without values.
        """
        unread = self.unread(tensors)
        if dtype is not None:  # transformers goes by the parameter that it fills
            named = (*part.named_parameters(), *part.named_buffers())
            self._cast = part, {name: tensor.dtype for name, tensor in named}
            part.to(dtype)
        fill_buffers(self.model, part, device, self.is_beside_text)
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype or self._dtype,
            weight_mapping=self._conversions.mapping,
            ignore_mismatched_sizes=False,
        )
        try:
            read = {key: tensor for key, tensor in tensors.items() if key not in unread}
            info, _ = convert_and_load_state_dict_in_model(self.model, read, config, None)
        except RuntimeError as error:
            if says_out_of_memory(str(error)):
                raise  # which is no fault of the checkpoint
            raise CheckpointError(f"loading {type(self.model).__name__}: {error}") from error
        problems = [str(entry) for entry in (*info.mismatched_keys, *info.conversion_errors.items(), *info.error_msgs)]
        if any(map(says_out_of_memory, problems)):  # transformers keeps it as a text
            raise torch.OutOfMemoryError(next(filter(says_out_of_memory, problems)))
        if problems:
            raise CheckpointError(
                f"a tensor does not fit {type(self.model).__name__}: {problems[0]:.300}; config.json and the shards "
                "are of different models"
            )
        part.requires_grad_(False)

    def unload(self, part: nn.Module) -> None:
        """Take a part of the model off its device.

        Args:
            part: The model or one of its blocks.
        """
        part.to("meta")
        if self._cast is not None and self._cast[0] is part:
            for name, dtype in self._cast[1].items():
                owner, _, leaf = name.rpartition(".")
                tensor = getattr(part.get_submodule(owner), leaf)
                tensor.data = tensor.data.to(dtype)
            self._cast = None

    def require_covered(self, targets: Set[str]) -> None:
        """Refuse a checkpoint that leaves a parameter that text needs outside the blocks without a tensor.

        What no text goes through is only copied, and its tensors may be converted in ways that are not known here.

        Args:
            targets: The model's names of all tensors that the checkpoint holds.

        Raises:
            CheckpointError: No tensor fills a parameter, and it is not tied to another; the message names the first.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, _ in self.model.named_parameters():
            covered = name in targets or (name in tied and tied[name] in targets)
            needed = self.block_of(name) is None and not self.is_beside_text(name)
            if needed and not covered:
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
        counts = ((num_experts(block), num_zero_experts(block)) for block in self.blocks)
        experts = next((count + zero for count, zero in counts if count), None)
        chosen = getattr(self.model.config.get_text_config(), "num_experts_per_tok", None)
        if isinstance(chosen, list | tuple):  # one number for each block
            chosen = sum(chosen) / len(chosen)
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
