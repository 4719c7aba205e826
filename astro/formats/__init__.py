"""The file formats ("layouts") that can hold quantized linear layers, and how another one is added.

To add a layout:

1. Write a module in this folder that has every member of `Layout`; `gptq_v1.py` is the shortest example.
2. Name the module in `LAYOUTS` below. mypy then checks its members and their types, and
   `tests/astro/formats/test_layouts.py` checks it like all others.
3. Add the name to `Quantization.format` in `astro/config.py`, and refuse there the settings that it cannot hold.

Everything else asks `LAYOUTS` and knows no layout by its name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from astro.activation_config import ActivationScheme
from astro.config import LayerScheme
from astro.formats import compressed_tensors, gptq_v1
from astro.model.linear_layer import LinearLayer
from astro.quantization.grid import QuantizedLinear

__all__ = ["LAYOUTS", "Layout"]


class Layout(Protocol):
    """One way to store quantized linear layers in safetensors files. A module of functions satisfies it."""

    @property
    def METHOD(self) -> str:
        """Name of the layout, as `quantization.format` and the `quant_method` of config.json write it."""

    @property
    def MARK(self) -> str:
        """Ending of the tensor name by which a reader sees that a layer is packed."""

    @property
    def SCALE_DTYPE(self) -> torch.dtype | None:
        """Dtype in which scales are stored; None where it is the dtype that the source's weights have."""

    @property
    def READER_PACKAGES(self) -> str:
        """Packages, in one string for `pip install`, that transformers needs besides itself to read the layout."""

    def suffixes(self, scheme: LayerScheme) -> tuple[str, ...]:
        """Return the endings of the tensors that replace a linear layer's `weight`.

        Args:
            scheme: Bits, group size and symmetry of the layer.
        """

    def refusal(self, rows: int, columns: int, scheme: LayerScheme) -> str | None:
        """Say why a layer cannot be stored; None where it can.

        Args:
            rows: Output size of the layer.
            columns: Input size of the layer.
            scheme: Bits, group size and symmetry of the layer.
        """

    def pack_linear(self, name: str, linear: QuantizedLinear, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the tensors that store one linear layer, by checkpoint name, on the layer's device.

        Args:
            name: Name of the layer in the checkpoint, without `.weight`.
            linear: Integers and grid of the layer.
            scale_dtype: Dtype in which the scales are stored; the grid's scales are exact in it.
        """

    def unpack_linear(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: LayerScheme) -> QuantizedLinear:
        """Read one linear layer back.

        Args:
            name: Name of the layer in the checkpoint, without `.weight`.
            tensors: Tensors by checkpoint name; those of the layer must be among them.
            scheme: Bits, group size and symmetry that the layer was written with.

        Raises:
            CheckpointError: A tensor is missing, has another shape than the others ask for, or a value that means
                nothing in this layout.
        """

    def quantization_config(
        self,
        schemes: Mapping[str, LayerScheme],
        ignore: Sequence[str],
        act_order: Literal["static", "none"],
        inputs: ActivationScheme | None = None,
    ) -> dict[str, Any]:
        """Return the `quantization_config` that config.json holds.

        Args:
            schemes: Bits, group size and symmetry of every quantized layer, by module name.
            ignore: Names of the linear modules that are not quantized.
            act_order: Order in which the solver visited columns.
            inputs: Kind of grid to which servers round the inputs of every quantized layer; None where they stay as
                they are.

        Raises:
            ConfigError: The layout cannot say that inputs are rounded.
        """

    def read_inputs(self, config: Mapping[str, Any]) -> ActivationScheme | None:
        """Read to which kind of grid servers round the inputs of quantized layers; None where they stay as they are.

        Args:
            config: The `quantization_config` of config.json.

        Raises:
            CheckpointError: Inputs are rounded in a way that this project never writes, or not alike in all layers.
        """

    def read_schemes(self, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, LayerScheme]:
        """Read the schemes of layers from a `quantization_config` that `quantization_config` wrote.

        Args:
            config: The `quantization_config` of config.json.
            names: Module names of the packed layers.

        Raises:
            CheckpointError: The config is of another layout, or does not say exactly once how a layer is stored.
        """

    def is_ignored(self, config: Mapping[str, Any], name: str) -> bool:
        """Tell whether a `quantization_config` says that a linear module is not packed.

        Args:
            config: The `quantization_config` of config.json.
            name: Name of the linear module.
        """

    def fusion_refusal(self, schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> str | None:
        """Say which layers must have one scheme because servers fuse them, and have not; None where all is well.

        Args:
            schemes: Every scheme that each quantized layer may get, by module name; see `server_notes`.
            ignore: Names of the linear modules that are not quantized.
        """

    def server_notes(self, schemes: Mapping[str, Sequence[LayerScheme]], ignore: Sequence[str]) -> list[str]:
        """Say what servers are known to refuse about some layers, one sentence each; empty where all load it.

        Args:
            schemes: Every scheme that each quantized layer may get, by module name: one where its width is settled,
                one for each width to choose from where `bits: auto` has yet to choose.
            ignore: Names of the linear modules that are not quantized.
        """

    def inputs_refusal(
        self,
        layers: Iterable[LinearLayer],
        schemes: Mapping[str, Sequence[LayerScheme]],
        inputs: ActivationScheme | None,
    ) -> str | None:
        """Say why no server takes some layers with rounded inputs, and what it would take; None where one does.

        Args:
            layers: The layers that are quantized.
            schemes: Every scheme that each of them may get, by module name; see `server_notes`.
            inputs: Grid of their inputs; None where they stay as they are.
        """

    def inputs_notes(
        self,
        layers: Iterable[LinearLayer],
        schemes: Mapping[str, Sequence[LayerScheme]],
        inputs: ActivationScheme | None,
    ) -> list[str]:
        """Say where servers leave inputs in 16 bits that they are told to round, one sentence each.

        Args:
            layers: The layers that are quantized, none of which is refused.
            schemes: Every scheme that each of them may get, by module name; see `server_notes`.
            inputs: Grid of their inputs; None where they stay as they are.
        """

    def reader_notes(self, layers: Iterable[LinearLayer]) -> list[str]:
        """Say what transformers cannot read of some layers, or reads wrongly, whatever their schemes.

        Args:
            layers: The layers that are quantized.
        """


# Written out: in a loop over modules mypy would not look at their members.
LAYOUTS: dict[str, Layout] = {compressed_tensors.METHOD: compressed_tensors, gptq_v1.METHOD: gptq_v1}
"""Every layout, by the name that `quantization.format` and the `quant_method` of config.json give it."""
