"""What the user should know of a source whose weights are decoded while they are read."""

from collections import Counter
from collections.abc import Iterator, Sequence

from astro.config import LayerScheme
from astro.storage.encoded_names import Encoded

__all__ = ["source_notes"]

_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
_FEW_BITS = 4
"""Bits up to which rounding again makes a difference to how a run should be set."""


def source_notes(encoded: Encoded, schemes: Sequence[LayerScheme]) -> Iterator[str]:
    """Say what is decoded from what, and whether it makes sense to round it again.

    Args:
        encoded: The part of the source that is decoded.
        schemes: The schemes that the quantized layers of the run may get.
    """
    if encoded.method is None:
        return
    if not encoded.weights:
        yield (
            f"config.json says that the source is quantized ({encoded.method}), but every weight is stored in 16 or 32 "
            "bits and is taken as it is; the result's config.json says nothing of that any more"
        )
        return
    labels = Counter(f"{weight.label} to {_DTYPES[weight.dtype]}" for weight in encoded.weights)
    listed = ", ".join(f"{count} from {label}" for label, count in labels.most_common())
    dropped = (
        f"; {encoded.num_dropped} scales of activations, or of the cache of keys and values, are left out"
        if encoded.num_dropped
        else ""
    )
    yield f"the source is quantized ({encoded.method}): its weights are decoded while they are read, {listed}{dropped}"
    bits = min(weight.bits for weight in encoded.weights)
    if bits <= _FEW_BITS <= max(scheme.bits for scheme in schemes):
        yield (
            f"the source's weights have {bits} bits already: rounding them again at {_FEW_BITS} or more bits makes the "
            "model no smaller and a little worse; choose quantization.bits 3 or 2, or a mixture of these"
        )
