"""Weights that are stored as small numbers and scales, turned back into floats. Arithmetic only, in float32.

Every format that is decoded here has the same form. Row i and column j of a weight are

    w_ij = (v_ij − z) · s,    z and s those of the block (⌊i / b_R⌋, ⌊j / b_C⌋)

and the formats differ in how the numbers v are stored, and in the block. The last block of a row or column may be
partial, so b_R and b_C cannot be told from the number of scales: they come from the configuration of the source.

| format | numbers v | block b_R × b_C | scale s | source |
|---|---|---|---|---|
| FP8 | float8, one a byte | as configured, a row, or the tensor | float32, bfloat16, E8M0 | DeepSeek-V3, section 3.3 |
| MXFP4 | E2M1, two a byte | 1 × 32 | E8M0 | OCP Microscaling Formats 1.0 |
| NVFP4 | E2M1, two a byte | 1 × 16 | E4M3, and a float32 for the tensor | compressed-tensors, ModelOpt |
| integers | b bits, in int32 words | 1 × group, or a row | float16 or bfloat16 | compressed-tensors |

Shapes: R rows, C columns, G = ⌈C / b_C⌉ scales a row; `...` are dimensions before the rows, e.g. experts.
"""

import torch

__all__ = ["E2M1", "block_values", "float4_values", "scale_values"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that the lower three bits of a 4-bit float stand for; the fourth bit is the sign."""


def float4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit floats that are stored two in a byte, the lower half of the byte first.

    Args:
        packed: Bytes, uint8 or int8 [..., C / 2].

    Returns:
        The values, float32 [..., C].

    >>> float4_values(torch.tensor([0x21, 0xF9], dtype=torch.uint8)).tolist()
    [0.5, 1.0, -0.5, -6.0]
    """
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=packed.device)
    byte = torch.arange(256, device=packed.device)
    # A pair of float32 is looked up as one int64, which is twice as fast.
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).view(torch.int64).flatten()
    looked_up = pairs.index_select(0, packed.view(torch.uint8).flatten().int())
    return looked_up.view(torch.float32).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32.

    Bytes and `float8_e8m0fnu` are exponents with a bias (E8M0): e stands for 2^(e − 127), and 255 for NaN.

    Args:
        scales: Scales of any float dtype, or uint8.

    Returns:
        The scales, float32, in the same shape.

    >>> scale_values(torch.tensor([127, 130, 126], dtype=torch.uint8)).tolist()
    [1.0, 8.0, 0.5]
    """
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def block_values(per_block: torch.Tensor, block: tuple[int, int], V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value of the block that each element of a matrix lies in, and the matrix in a shape that fits it.

    Args:
        per_block: A value for each block, [..., ⌈R / b_R⌉, ⌈C / b_C⌉].
        block: Rows b_R and columns b_C of a block.
        V: The matrix, contiguous [..., R, C].

    Returns:
        The values and a view of the matrix, broadcast against each other: [..., R, G, 1] and [..., R, G, b_C], so that
        no copy of the matrix's size is made; or [..., R, C] both where the last block of a row is partial.

    >>> values, view = block_values(torch.tensor([[1, 2]]), (2, 2), torch.zeros(1, 3))
    >>> values.tolist(), view.tolist()
    ([[1, 1, 2]], [[0.0, 0.0, 0.0]])
    """
    rows, columns = V.shape[-2:]
    by_row = per_block.repeat_interleave(block[0], dim=-2)[..., :rows, :] if block[0] > 1 else per_block
    if columns % block[1] == 0:
        return by_row.unsqueeze(-1), V.unflatten(-1, (-1, block[1]))
    return by_row.repeat_interleave(block[1], dim=-1)[..., :columns], V
