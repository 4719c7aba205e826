"""The weights of a model, block by block, whether its file holds them as they are, encoded, or packed by this project.

A packed layer is unpacked in float32 and put where the model holds it, so that no value is rounded to the file's scales
first. A quantized model of others is decoded to 16 bits, as a source is.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.errors import CheckpointError
from astro.formats import LAYOUTS, Layout
from astro.formats.block_shard import packed_keys, stem_of, unpack_layer
from astro.model.activations import BlockLayers
from astro.model.cache_scales import CacheScales
from astro.model.kv_cache import rounded_cache
from astro.model.linear_layer import LinearLayer
from astro.model.low_rank import attach
from astro.model.rounded_inputs import rounded_inputs
from astro.model.skeleton import Skeleton
from astro.storage.atomic import read_json
from astro.storage.byte_store import Store
from astro.storage.checkpoint import Checkpoint
from astro_dist.export.adapter_file import AdapterFile
from astro_dist.export.cache_scales import SCALE_NAMES
from astro_dist.export.input_scales import read_input_scales
from astro_dist.export.packed_layers import is_packed, packed_layers
from astro_dist.planning.checkpoint_plan import assign_tensors
from astro_dist.source.resolve import Source

__all__ = ["BlockWeights"]

_log = logging.getLogger("astro_dist")

_View = Callable[[torch.Tensor], torch.Tensor]
"""A function that finds a layer's part of a parameter, as a view of it."""


class BlockWeights:
    """Fills a skeleton from the files of a model, a part at a time.

    Attributes:
        skeleton: The model, on the meta device but for what is filled.
        dtype: Dtype of most weights in the files, after decoding.
        num_weights: Number of weights that text needs.
        inputs: Kind of grid to which servers round the inputs of packed layers; None where they stay as they are.
        rounds_cache: Whether servers hold keys and values in FP8.
    """

    def __init__(self, source: Source, skeleton: Skeleton) -> None:
        """Read the headers.

        Args:
            source: Where the model's files are.
            skeleton: The model on the meta device.

        Raises:
            CheckpointError: A tensor that text needs is missing, or does not fit the model.
        """
        store = source.store
        self.skeleton = skeleton
        self._layout: Layout | None = None
        self._stems: set[str] = set()
        self._schemes: Mapping[str, LayerScheme] = {}
        self._layers: dict[tuple[int, ...], BlockLayers] = {}
        self.inputs: ActivationScheme | None = None
        self.rounds_cache = False
        self._checkpoint = self._open_packed(store, source.folder) or Checkpoint.open_source(store)
        # Another model's folder of this name may hold anything.
        self._adapter = AdapterFile.of(source) if self._stems else None
        self._corrected_layers = self._adapter.by_block(skeleton) if self._adapter else {}
        self._corrected: dict[int, list[RemovableHandle]] = {}
        self._places = assign_tensors(self._checkpoint, skeleton)
        entries = self._checkpoint.entries
        self.dtype = entries[self._places.outside[0]].float_dtype or torch.float32
        text = (p for name, p in skeleton.model.named_parameters() if not skeleton.is_beside_text(name))
        self.num_weights = sum(parameter.numel() for parameter in text)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the files, those of the adapter among them, 64 hexadecimal digits."""
        model = self._checkpoint.fingerprint()
        if self._adapter is None:
            return model
        return hashlib.sha256(f"{model}{self._adapter.checkpoint.fingerprint()}".encode()).hexdigest()

    @property
    def correction_ranks(self) -> Mapping[str, int]:
        """The rank of each layer's correction by the layer's name; empty for a model without an adapter."""
        return self._adapter.ranks if self._adapter else {}

    def outside(self) -> dict[str, torch.Tensor]:
        """Read embeddings, norm and head, by checkpoint name."""
        return self._checkpoint.read(self._places.outside)

    def linear_layers(self, index: int) -> list[LinearLayer]:
        """Return the linear layers of a block, without gates.

        Args:
            index: Index of the block.
        """
        keys = self._places.by_block.get(index, [])
        stems = self._stems_of(keys)
        names = [*(key for key in keys if not is_packed(key, stems)), *(f"{stem}.weight" for stem in stems)]
        shapes = {key: self._checkpoint.entries[key].shape for key in keys}
        return self.skeleton.linear_layers(index, names, shapes)[0]

    def fill_block(self, index: int, device: torch.device) -> nn.Module:
        """Fill a block and return it.

        Args:
            index: Index of the block.
            device: Device that the block is put on.

        Raises:
            CheckpointError: A tensor is missing or damaged.
        """
        block, skeleton = self.skeleton.blocks[index], self.skeleton
        self._checkpoint = self._checkpoint.decoding_on(device)
        keys = self._places.by_block.get(index, [])
        by_parameter = self._packed_parameters(index, keys)
        apart = {layer.key for layers in by_parameter.values() for layer in layers}
        apart |= {_bias(layer) for layers in by_parameter.values() for layer in layers if layer.expert is not None}
        loose = [key for key in keys if not is_packed(key, self._stems) and key not in apart]
        skeleton.load(block, self._checkpoint.read(loose), device)
        for parameter, layers in by_parameter.items():
            self._fill_parameter(parameter, layers, device)
        skeleton.require_filled(block, f"block {index} of {self._checkpoint.store}")
        self._correct(index, device)
        return block

    def empty_block(self, index: int) -> None:
        """Take a block off the device.

        Args:
            index: Index of the block.
        """
        self.skeleton.blocks[index].to("meta")
        for handle in self._corrected.pop(index, ()):
            handle.remove()

    @contextmanager
    def rounding(self, *indices: int) -> Iterator[None]:
        """Let blocks that are filled round as servers do while the body of a `with` statement runs.

        What is rounded are the inputs of their packed layers, and the keys and values that a cache holds.

        Args:
            indices: Indices of the blocks.
        """
        keys = {index: self._places.by_block.get(index, []) for index in indices}
        if self.inputs is not None and indices not in self._layers:
            of_blocks = (self._packed_parameters(index, keys[index]).values() for index in indices)
            packed = [layer for layers in chain(*of_blocks) for layer in layers if layer.stem in self._stems]
            if self.inputs.is_static:
                grids = read_input_scales(self._checkpoint, packed, self.inputs.bits)
                packed = [dataclasses.replace(layer, clips=grids[layer.name]) for layer in packed]
            self._layers[indices] = BlockLayers(self.skeleton.model, packed)
        scales = self._cache_scales(chain(*keys.values())) if self.rounds_cache else {}
        inputs = rounded_inputs(self._layers[indices], self.inputs) if self.inputs is not None else nullcontext()
        with inputs, rounded_cache(scales):
            yield

    def _cache_scales(self, keys: Iterable[str]) -> dict[nn.Module, CacheScales]:
        """Read the scales of an FP8 cache by attention module."""
        key_scale, value_scale = SCALE_NAMES
        stems = [key.removesuffix(f".{key_scale}") for key in keys if key.endswith(f".{key_scale}")]
        scales: dict[nn.Module, CacheScales] = {}
        for stem in stems:
            names = (f"{stem}.{key_scale}", f"{stem}.{value_scale}")
            read = self._checkpoint.read(names)
            module = self.skeleton.target_of(names[0])[0].removesuffix(f".{key_scale}")
            scales[self.skeleton.model.get_submodule(module)] = CacheScales(*(float(read[name]) for name in names))
        return scales

    def _correct(self, index: int, device: torch.device) -> None:
        """Let the layers of a filled block add the corrections of the model's adapter, if it has one."""
        if self._adapter is None:
            return
        for handle in self._corrected.pop(index, ()):
            handle.remove()
        read = self._adapter.corrections(self._corrected_layers.get(index, ()))
        corrections = {name: correction.to(device) for name, correction in read.items()}
        dtype = next(self.skeleton.blocks[index].parameters()).dtype
        self._corrected[index] = attach(self.skeleton.model, corrections, dtype)

    def _open_packed(self, store: Store, folder: Path) -> Checkpoint | None:
        """Open a model that this project packed; None for any other."""
        config = read_json(folder / "config.json", "a checkpoint folder must hold it").get("quantization_config")
        layout = LAYOUTS.get(str(config.get("quant_method"))) if isinstance(config, dict) else None
        if layout is None or config is None:
            return None
        checkpoint = Checkpoint.open(store)
        stems = {stem for key in checkpoint.entries if (stem := stem_of(key, layout.MARK)) is not None}
        try:
            layers, _ = packed_layers(checkpoint, self.skeleton, stems)
            schemes = layout.read_schemes(config, [name for layer in layers for name in layer.config_names])
            inputs = layout.read_inputs(config)
            self._require_in_blocks(stems)
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
            if layout is LAYOUTS["compressed-tensors"]:  # of another tool; it is decoded as a source would be
                if "input_activations" in str(config.get("config_groups")):
                    message = "%s: its config.json lets servers round the inputs of layers, which is not done here: %s"
                    _log.warning(message, store, error)
                return None
            is_said = isinstance(error, CheckpointError)
            reason = error if is_said else f"its quantization_config is incomplete: {error!r}"
            raise CheckpointError(
                f"{store}: cannot be unpacked: {reason}; in this layout the results of astro-dist alone are read, give "
                "the original model or one in another layout"
            ) from error
        self._layout, self._stems, self._schemes, self.inputs = layout, stems, schemes, inputs
        self.rounds_cache = bool(config.get("kv_cache_scheme"))
        return checkpoint

    def _require_in_blocks(self, stems: Iterable[str]) -> None:
        """Refuse packed layers outside of blocks, which this project never packs."""
        for stem in stems:
            if self.skeleton.block_of(self.skeleton.target_of(f"{stem}.weight")[0]) is None:
                raise CheckpointError(f"{stem} is packed, and in no block")

    def _packed_parameters(self, index: int, keys: Sequence[str]) -> dict[str, list[LinearLayer]]:
        """Return the layers in each parameter of a block that holds a packed layer; experts share a parameter."""
        if not self._stems_of(keys):
            return {}
        layers = self.linear_layers(index)
        parameters = dict.fromkeys(layer.parameter for layer in layers if layer.stem in self._stems)
        return {name: [layer for layer in layers if layer.parameter == name] for name in parameters}

    def _stems_of(self, keys: Iterable[str]) -> set[str]:
        """Return the stems of the packed layers that some tensors belong to."""
        return {stem for key in keys if self._layout and (stem := stem_of(key, self._layout.MARK)) is not None}

    def _fill_parameter(self, name: str, layers: Sequence[LinearLayer], device: torch.device) -> None:
        """Put the weights of layers into the parameter that holds them all, and the biases of experts beside it."""
        self._set(name, device, ((layer.view, self._weight(layer)) for layer in layers))
        biases = [layer for layer in layers if layer.expert is not None and _bias(layer) in self._checkpoint.entries]
        if biases and self.skeleton.shape_of(f"{name}_bias") is not None:
            read = self._checkpoint.read([_bias(layer) for layer in biases])
            self._set(f"{name}_bias", device, ((layer.stored_bias, read[_bias(layer)]) for layer in biases))

    def _weight(self, layer: LinearLayer) -> torch.Tensor:
        """Return the weight of a layer [rows, columns]: unpacked in float32, or as it is stored."""
        if layer.stem not in self._stems:
            return layer.stored(self._checkpoint.read([layer.key])[layer.key])
        assert self._layout is not None
        scheme, entries = self._schemes[layer.config_names[0]], self._checkpoint.entries
        keys = [key for key in packed_keys(self._layout, layer, scheme).values() if key in entries]
        W = unpack_layer(self._layout, layer, self._checkpoint.read(keys), scheme).dequantize()
        if W.shape != (layer.rows, layer.columns):
            raise CheckpointError(
                f"{self._checkpoint.store}: {layer.stem} is packed as {list(W.shape)}, the model has "
                f"{[layer.rows, layer.columns]}"
            )
        return W

    def _set(self, name: str, device: torch.device, parts: Iterable[tuple[_View, torch.Tensor]]) -> None:
        """Replace a parameter by a new one, whose parts are given with the functions that find their places in it."""
        owner, _, leaf = name.rpartition(".")
        module = self.skeleton.model.get_submodule(owner)
        before = module.get_parameter(leaf)
        values = torch.zeros(before.shape, dtype=before.dtype, device=device)
        for view, part in parts:
            view(values).copy_(part)
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _bias(layer: LinearLayer) -> str:
    """Name of the bias that is stored beside a packed layer of an expert."""
    return f"{layer.stem}{layer.joint}bias"
