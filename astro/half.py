"""Products of bfloat16 factors in place of float32 ones, where a device is faster with them.

Two kinds. `rounded_product` rounds its factors: for steps that are small beside what they are added to, and only there,
being off by 2⁻⁷ of the sum of magnitudes at most. `Split` keeps a float32 matrix as the sum of two of bfloat16; three
products of those are off by 2⁻¹⁵ at most and mostly far less, as float32 sums over thousands of columns are themselves,
and on a GPU's tensor cores they take a fraction of the time of one in float32. Products of bfloat16 are exact in
float32, in which a GPU adds them up; a CPU rounds the result of `rounded_product` once more.
"""

import functools

import torch

__all__ = ["Split", "rounded", "rounded_product", "splits"]


def rounded(X: torch.Tensor) -> torch.Tensor:
    """A float32 factor as `rounded_product` takes it: in bfloat16 where the device is faster with it, else as it is."""
    return X.bfloat16() if _is_faster(X.device) else X


def rounded_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B in float32 for A float32 [..., m, k] and B [..., k, n] that was `rounded`, with A rounded alike."""
    if B.dtype == torch.float32:
        return A @ B
    return (A.bfloat16() @ B).float() if B.device.type == "cpu" else _exact_product(A.bfloat16(), B)


def splits(device: torch.device) -> bool:
    """Whether three products of bfloat16 take less time than one of float32."""
    return device.type == "cuda" and _is_faster(device)


class Split:
    """A float32 matrix as the sum of two bfloat16 ones, which leave out 2⁻¹⁷ of each element at most.

    Attributes:
        high: the matrix rounded, bfloat16 [..., m, n].
        low: the rest of it, rounded, bfloat16 [..., m, n].
    """

    def __init__(self, X: torch.Tensor) -> None:
        """Split X, float32 [..., m, n]."""
        self.high = X.bfloat16()
        self.low = torch.empty_like(self.high)
        torch.sub(X, self.high, out=self.low)  # no float32 matrix between

    def set_rows_(self, rows: slice, X: torch.Tensor) -> None:
        """Put other rows in place of some, float32 [..., rows, n]."""
        high = self.high[..., rows, :].copy_(X)
        torch.sub(X, high, out=self.low[..., rows, :])

    def rows_times(self, rows: slice, other: "Split") -> torch.Tensor:
        """Some rows of the product with another matrix [..., n, k], float32 [..., rows, k]."""
        high, low = self.high[..., rows, :], self.low[..., rows, :]
        result = _exact_product(high, other.high)
        return result.add_(_exact_product(high, other.low)).add_(_exact_product(low, other.high))


def _exact_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B of bfloat16 factors, added up in float32."""
    if A.device.type == "cpu":  # which has no such product
        return A.float() @ B.float()
    multiply = torch.mm if A.ndim == 2 else torch.bmm
    result: torch.Tensor = multiply(A, B, out_dtype=torch.float32)
    return result


@functools.cache
def _is_faster(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; others emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # An older torch cannot say what a CPU has; float32 is never wrong.
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
