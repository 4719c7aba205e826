"""The functions of torch that multiply activations with a weight, and where among their arguments the factors are."""

from collections.abc import Mapping

__all__ = ["PRODUCTS", "Argument"]

Argument = tuple[int, str]
"""Position and name of an argument."""

PRODUCTS: Mapping[str, tuple[Argument, Argument, Argument | None]] = {
    "linear": ((0, "input"), (1, "weight"), (2, "bias")),
    "matmul": ((0, "input"), (1, "other"), None),
    "__matmul__": ((0, "self"), (1, "other"), None),
    "mm": ((0, "input"), (1, "mat2"), None),
    "bmm": ((0, "input"), (1, "mat2"), None),
    "addmm": ((1, "mat1"), (2, "mat2"), (0, "input")),
    "baddbmm": ((1, "batch1"), (2, "batch2"), (0, "input")),
}
"""Inputs, weight, and what is added, if anything is, by the function's name."""
