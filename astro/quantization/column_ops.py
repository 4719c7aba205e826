"""The kernels of `column_kernels` as operators of torch, which know what they write.

So torch can follow them like its own: in a profile, in a count of launches, and on tensors that have shapes and a
device but no data. Triton is loaded when the first of them is launched, because builds of torch for CPUs come without.
Shapes are those of the kernels.
"""

import functools
import os
from types import ModuleType

import torch

from astro.errors import NumericalError

__all__ = ["move_columns", "move_scale", "require_kernels", "round_columns"]


@torch.library.custom_op("astro::round_columns", mutates_args=("E", "Q"))
def round_columns(
    M: torch.Tensor,
    T: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    E: torch.Tensor,
    Q: torch.Tensor,
    q_min: int,
    q_max: int,
) -> None:
    """Round the columns of a block, one after the other.

    Args:
        M: Couplings of the columns, float32 [B, P, P], a view of [B, C, C].
        T: What the columns want, float32 [B, P, R].
        W: Weights, float32 [B, P, R], a view of [B, C, R].
        scale: Scales of all groups, float32 [B, G, R].
        zero: Zero points of all groups, float32 [B, G, R].
        group: The group of each column, int64 [B, P], a view of [B, C].
        E: Errors w − q, float32 [B, P, R], a view of [B, C, R], which is filled.
        Q: Integers, int8 [B, P, R], a view of [B, C, R], which is filled.
        q_min: The least integer.
        q_max: The greatest integer.
    """
    sizes = (scale.stride(0), E.stride(0), T.stride(0), *M.stride(), group.stride(0))
    _launch("round_columns", E, (M, T, W, scale, zero, group, E, Q, q_min, q_max), sizes)


@torch.library.custom_op("astro::move_scale", mutates_args=("E", "E_rounded", "G", "scale", "gain", "error"))
def move_scale(
    V: torch.Tensor,
    E: torch.Tensor,
    E_rounded: torch.Tensor | None,
    G: torch.Tensor,
    HV: torch.Tensor,
    damping: torch.Tensor,
    scale: torch.Tensor,
    gain: torch.Tensor,
    error: torch.Tensor,
    caution: float,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Refit the scale of a group, and bring its errors and slopes up to date.

    Args:
        V: Integers from their zero points, float32 [B, g, R], a view of [B, C, R].
        E: Errors of the weights, float32, a view like V.
        E_rounded: The same in bfloat16, or None where nothing is rounded.
        G: Slopes, the rows of (H + λI) E, float32 [B, g, R].
        HV: The group's part of H V, without damping, float32 [B, g, R].
        damping: Damping λ of each layer, float32 [B].
        scale: Scales of the group, float32 [B, R], a view of [B, G, R].
        gain: By how much the error of each row has fallen, float32 [B, R].
        error: The error of each row as the pass met it, float32 [B, R].
        caution: Share of a slope that is believed.
        scale_dtype: Dtype in which scales are stored.

    Returns:
        The change of ŵ, float32 [B, g, R].
    """
    change = torch.empty_like(HV)
    arrays = (V, E, E_rounded, G, HV, damping, scale, gain, error, change, caution)
    _launch("move_scale", E, arrays, (scale.stride(0), E.stride(0), G.stride(0)), scale_dtype)
    return change


@torch.library.custom_op("astro::move_columns", mutates_args=("V", "E", "E_rounded", "gain"))
def move_columns(
    H: torch.Tensor,
    V: torch.Tensor,
    E: torch.Tensor,
    E_rounded: torch.Tensor | None,
    G: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    gain: torch.Tensor,
    caution: float,
) -> torch.Tensor:
    """Choose the integers of some columns of a group anew, one column after the other.

    Args:
        H: Undamped Hessians of the columns, float32 [B, P, P], a view of [B, C, C].
        V: Integers from their zero points, float32 [B, P, R], a view of [B, C, R].
        E: Errors of the weights, float32, a view like V.
        E_rounded: The same in bfloat16, or None where nothing is rounded.
        G: Slopes, the rows of (H + λI) E, float32 [B, P, R].
        steps: The caution over the diagonal of H + λI, float32 [B, P], a view of [B, C].
        scale: Scales of the group, float32 [B, R], a view of [B, G, R].
        low: The least V of the group, a view like the scale.
        high: The greatest V of the group, a view like the scale.
        gain: By how much the error of each row has fallen, float32 [B, R].
        caution: Share of the way to a parabola's minimum that is gone.

    Returns:
        The change of ŵ, float32 [B, P, R].
    """
    change = V.new_empty(V.shape)
    arrays = (H, V, E, E_rounded, G, steps, scale, low, high, gain, change, caution)
    sizes = (scale.stride(0), E.stride(0), G.stride(0), *H.stride(), steps.stride(0))
    _launch("move_columns", E, arrays, sizes)
    return change


@move_scale.register_fake
def _(V, E, E_rounded, G, HV, damping, scale, gain, error, caution, scale_dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(HV)


@move_columns.register_fake
def _(H, V, E, E_rounded, G, steps, scale, low, high, gain, caution):  # type: ignore[no-untyped-def]
    return V.new_empty(V.shape)


def require_kernels(device: torch.device) -> None:
    """Make sure that the kernels can run.

    Args:
        device: The device on which they are to run.

    Raises:
        NumericalError: Triton cannot be imported, or the device is a CPU, where only its interpreter runs.
    """
    _kernels()
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NumericalError(
            "the kernels of the column loops run on GPUs only, and the device is a CPU; set execution.compile to auto"
        )


@functools.cache
def _kernels() -> ModuleType:
    try:
        from astro.quantization import column_kernels
    except ImportError as error:
        raise NumericalError(
            f"the kernels of the column loops need Triton, which comes with torch's builds for GPUs: {error}; install "
            "such a build, or set execution.compile to false"
        ) from error
    return column_kernels


def _launch(
    name: str,
    E: torch.Tensor,
    arguments: tuple[object, ...],
    sizes: tuple[int, ...],
    scale_dtype: torch.dtype | None = None,
) -> None:
    """Launch a kernel for the rows of every layer, on the device of E."""
    kernels = _kernels()
    layers, num_columns, num_rows = E.shape
    grid = (-(-num_rows // kernels.ROWS), layers)
    constants = {"ROWS": kernels.ROWS}
    if scale_dtype is not None:
        constants["SCALE"] = getattr(kernels.tl, str(scale_dtype).removeprefix("torch."))
    # Triton launches on the current device. What may be fused to one rounding is written out in the kernels.
    with torch.cuda.device(E.device if E.device.type == "cuda" else -1):
        getattr(kernels, name)[grid](
            *arguments, num_columns, num_rows, *sizes, **constants, num_warps=1, enable_fp_fusion=False
        )
