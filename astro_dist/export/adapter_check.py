"""The check that an adapter fits the model that it lies beside."""

from collections.abc import Mapping

import torch

from astro.errors import CheckpointError
from astro.model.linear_layer import LinearLayer
from astro_dist.export.adapter_file import ADAPTER_WEIGHTS, AdapterFile
from astro_dist.export.smoothing_file import needs_adapter
from astro_dist.source.resolve import Source

__all__ = ["checked_adapter"]


def checked_adapter(model: Source, layers: Mapping[str, LinearLayer]) -> AdapterFile | None:
    """Check that a model's adapter corrects packed layers alone, in their shapes.

    Args:
        model: Where the files of the model are.
        layers: The packed layers by name.

    Returns:
        The adapter; None where the model has none.

    Raises:
        CheckpointError: The adapter is damaged, is of another model, or is missing where the model wants it.
    """
    adapter = AdapterFile.of(model)
    if adapter is None:
        if needs_adapter(model.folder):
            raise CheckpointError(
                f"{model.store}: has no {ADAPTER_WEIGHTS}, which alone holds the weights of its outlier channels; the "
                "model is of no use without it, so copy or download it too"
            )
        return None
    place = f"{model.store}/{ADAPTER_WEIGHTS}"
    for name in adapter.ranks:
        if name not in layers:
            raise CheckpointError(f"{place}: corrects {name}, which is no packed layer; it is of another run")
        correction, layer = adapter.corrections([name])[name], layers[name]
        shape = (len(correction.B), correction.A.shape[1])
        if shape != (layer.rows, layer.columns):
            raise CheckpointError(f"{place}: corrects {name} as {shape}, it is {(layer.rows, layer.columns)}")
        if not bool(torch.isfinite(correction.A).all() & torch.isfinite(correction.B).all()):
            raise CheckpointError(f"{place}: the correction of {name} holds NaN or Inf")
    return adapter
