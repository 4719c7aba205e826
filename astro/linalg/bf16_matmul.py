"""Products of bfloat16 factors in place of float32 ones, where a device is faster with them.

Meant for steps that are small beside what they are added to, and for slopes of what is rounded to a grid: a product is
off by 2⁻⁷ of the sum of magnitudes at most, and mostly far less. Products of bfloat16 are exact in float32, in which a
GPU adds them up; a CPU rounds the result once more, by 2⁻⁸ of itself.
"""

import functools

import torch

__all__ = ["operand", "product"]


def operand(X: torch.Tensor) -> torch.Tensor:
    """Return a float32 factor as `product` takes it: in bfloat16 where the device is faster with it, else as it is."""
    return X.bfloat16() if _is_faster(X.device) else X


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return A B in float32 for factors [..., m, k] and [..., k, n] that `operand` made."""
    if B.dtype == torch.float32:
        return A @ B
    if B.device.type == "cpu":  # which has no product of halves with a float32 result
        return (A @ B).float()
    multiply = torch.mm if A.ndim == 2 else torch.bmm
    result: torch.Tensor = multiply(A, B, out_dtype=torch.float32)
    return result


@functools.cache
def _is_faster(device: torch.device) -> bool:
    """Tell whether the device has units for bfloat16; others emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # An older torch cannot say what a CPU has; float32 is never wrong.
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
