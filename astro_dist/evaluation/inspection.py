"""What makes a model hard to quantize, layer by layer, seen while a text passes through its blocks one by one."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from astro.calibration.outlier_channels import BlockWatch, LayerFigures
from astro.errors import NumericalError
from astro.model.activations import BlockLayers
from astro.process import configure_process, peak_rss_bytes
from astro_dist.config.schema import TextSource
from astro_dist.evaluation.judge_settings import JudgeSettings
from astro_dist.evaluation.streamed_model import StreamedModel
from astro_dist.evaluation.text_windows import WindowCut, cut_windows
from astro_dist.export.named_model import find_model
from astro_dist.source.text_tokens import require_known
from astro_dist.source.whole_text import read_rows, require_place

__all__ = ["InspectRequest", "Inspection", "KindFigures", "ModelFigures", "inspect_model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """What shall be looked at.

    Attributes:
        text: Text that passes through the model; `python-docs` for what Python ships.
        window: Number of tokens of a window.
        limit: Largest number of windows.
        against: Model to compare with, as it was before; None for none.
    """

    text: TextSource
    window: int = 512
    limit: int = 16
    against: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindFigures:
    """What was seen of all layers of one kind, such as all `mlp.down_proj`.

    Attributes:
        outlier_channels: Number of outlier channels of all of them.
        most: Layer with the most outlier channels; of several, with the largest ratio.
        input_ratio: Largest mean magnitude of a channel of any, as a multiple of that of all channels of its layer.
        input_kurtosis: Mean kurtosis of their inputs.
        output_kurtosis: Mean kurtosis of their outputs.
        weight_ratio: Largest weight of any, as a multiple of the root mean square in its layer.
    """

    outlier_channels: int
    most: LayerFigures
    input_ratio: float
    input_kurtosis: float
    output_kurtosis: float
    weight_ratio: float

    @classmethod
    def of(cls, layers: Sequence[LayerFigures]) -> "KindFigures":
        """Sum up the layers of one kind.

        Args:
            layers: Figures of the layers, at least one.
        """
        return cls(
            outlier_channels=sum(len(layer.outlier_channels) for layer in layers),
            most=max(layers, key=lambda layer: (len(layer.outlier_channels), layer.input_ratio)),
            input_ratio=max(layer.input_ratio for layer in layers),
            input_kurtosis=sum(layer.input_kurtosis for layer in layers) / len(layers),
            output_kurtosis=sum(layer.output_kurtosis for layer in layers) / len(layers),
            weight_ratio=max(layer.weight_ratio for layer in layers),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """What was seen of a model.

    Attributes:
        model: Folder or repository of the model.
        layers: Figures of each layer in the model's order.
        unseen: Number of layers that no token was seen at: experts that got none, or that all run in one product.
    """

    model: str
    layers: tuple[LayerFigures, ...]
    unseen: int

    def by_kind(self) -> Mapping[str, Sequence[LayerFigures]]:
        """Return the layers by kind, in the order of the first block that has the kind."""
        kinds: dict[str, list[LayerFigures]] = {}
        for layer in self.layers:
            kinds.setdefault(_kind(layer), []).append(layer)
        return kinds

    @property
    def outlier_channels(self) -> int:
        """Number of outlier channels of all layers."""
        return sum(len(layer.outlier_channels) for layer in self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was seen of a model, and of another one with the same tokens.

    Attributes:
        now: The model.
        before: The model that it is compared with; None where there was none.
        text: Where the text is from.
        window: Number of tokens of a window.
        windows: Number of windows.
        dtype: Dtype of the forward passes.
        device: Kind of the device, "cpu" or "cuda".
        peak_rss_bytes: Largest resident memory of the process, files that it mapped included, in bytes.
    """

    now: ModelFigures
    before: ModelFigures | None
    text: str
    window: int
    windows: int
    dtype: str
    device: str
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return dataclasses.asdict(self)


def inspect_model(name: str, request: InspectRequest, settings: JudgeSettings) -> Inspection:
    """Look at the inputs, outputs and weights of a model's linear layers, with one block in memory at a time.

    Args:
        name: Run directory, folder of a model, ORG/NAME[@REVISION] on the Hub, or any other source of `quantize`.
        request: What shall be looked at, and on which text.
        settings: Device, dtype and memory.

    Raises:
        InputError: The model or the text cannot be used.
        NumericalError: A forward pass overflowed.
    """
    settings.require_device()
    require_place(request.text, "--text")
    configure_process(torch.get_num_threads())
    model = StreamedModel(find_model(name), settings)
    before = StreamedModel(find_model(request.against), settings, "--against") if request.against else None
    rows = read_rows(request.text, "--text")
    text = cut_windows(request.text.source, rows, model.tokenizer, WindowCut(request.window, request.limit))
    for each in filter(None, (model, before)):
        require_known(int(text.input_ids.max()), each.skeleton.limits()[0], each.name)
    batches = text.input_ids.split(max(settings.batch_tokens // request.window, 1))
    return Inspection(
        now=_watch(model, batches),
        before=_watch(before, batches) if before else None,
        text=request.text.source,
        window=request.window,
        windows=len(text.input_ids),
        dtype=str(model.dtype),
        device=model.device.type,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _watch(model: StreamedModel, batches: Sequence[torch.Tensor]) -> ModelFigures:
    """Let batches pass through all blocks of a model. They are one wave: the figures of a layer come from all of it."""
    layers: list[LayerFigures] = []
    unseen = 0

    @contextlib.contextmanager
    def watched(index: int) -> Iterator[None]:
        nonlocal unseen
        watch = BlockWatch(index, BlockLayers(model.skeleton.model, model.linear_layers(index)))
        with watch.watching():
            yield
        figures, missed = watch.figures()
        layers.extend(figures)
        unseen += missed

    model.last_hidden(batches, watched)
    for layer in layers:
        if not layer.input_max < float("inf"):  # NaN is not below either
            raise NumericalError(
                f"{model.name}: an input of {layer.names[0]} is not finite; a forward pass overflowed in "
                f"{model.dtype}, or its weights hold NaN: try --dtype float32"
            )
    return ModelFigures(model=model.name, layers=tuple(layers), unseen=unseen)


def _kind(layer: LayerFigures) -> str:
    """Name of a layer within its block, experts by a `*`; of joined layers the names of all."""
    first, *others = layer.names
    parts = first.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    inner = ["*" if part.isdigit() else part for part in parts[numbers[0] + 1 :]] if numbers else parts
    return "+".join([".".join(inner), *(other.rpartition(".")[2] for other in others)])
