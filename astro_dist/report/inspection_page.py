"""What was seen of a model's layers as one HTML page, which has no script and loads nothing."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import astro
from astro.calibration.outlier_channels import OUTLIER_RATIO, LayerFigures
from astro.storage.atomic import write_text
from astro_dist.evaluation.inspection import Inspection, ModelFigures
from astro_dist.report.heat_map import HeatMap, map_of_kinds
from astro_dist.report.html import TEMPLATES
from astro_dist.report.inspection_words import TITLES, facts, inspection_rows

__all__ = ["write_page"]

_Figure = Callable[[LayerFigures], float]


@dataclasses.dataclass(frozen=True)
class _Chart:
    """A chart shows one figure of every layer.

    Attributes:
        title: Title of the chart.
        note: What the figure is.
        figure: Name of the figure.
        maps: Name of each model and its heat map.
    """

    title: str
    note: str
    figure: str
    maps: tuple[tuple[str, HeatMap], ...]


_CHARTS: tuple[tuple[str, str, str, _Figure], ...] = (
    (
        "Largest channel of every layer's input",
        "Mean magnitude of the largest channel, as a multiple of that of all channels.",
        "ratio",
        lambda layer: layer.input_ratio,
    ),
    (
        "Kurtosis of every layer's output",
        "Over the features of a token, the mean over tokens; 3 for a normal distribution.",
        "kurtosis",
        lambda layer: layer.output_kurtosis,
    ),
    (
        "Largest weight of every layer",
        "As a multiple of the root mean square of the layer's weights.",
        "ratio",
        lambda layer: layer.weight_ratio,
    ),
)


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the page.

    Args:
        inspection: What was seen.
        path: Path of the page.

    Raises:
        StorageError: The page cannot be written.
    """
    models = [model for model in (inspection.before, inspection.now) if model is not None]
    charts = []
    for title, note, figure, value in _CHARTS:
        everything = [value(layer) for model in models for layer in model.layers]  # both models have the same colours
        maps = tuple((model.model, _map(model, value, everything)) for model in models)
        charts.append(_Chart(title, note, figure, maps))
    page = TEMPLATES.get_template("inspection.html.j2").render(
        now=inspection.now, before=inspection.before, facts=facts(inspection), ratio=OUTLIER_RATIO,
        titles=TITLES, rows=inspection_rows(inspection), charts=charts, version=astro.__version__,
    )  # fmt: skip
    write_text(path, page)


def _map(model: ModelFigures, value: _Figure, all_figures: Sequence[float]) -> HeatMap:
    kinds: dict[str, dict[int, list[float]]] = {}
    for kind, layers in model.by_kind().items():
        for layer in layers:
            kinds.setdefault(kind, {}).setdefault(layer.block, []).append(value(layer))
    return map_of_kinds(kinds, all_figures)
