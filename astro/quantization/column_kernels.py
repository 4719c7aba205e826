"""The loops of GPTQ and of refinement as kernels for a GPU, written in Triton: one launch settles a block of columns.

They do what `gptq.solve` and `refine.refine` do with operations of torch, up to the last bits; the numbers of equations
are theirs. A program has some rows, each of them a thread of its own. Where a column takes what all columns before it
in the block were settled to, it reads back what the same thread wrote, so that nothing has to wait for another thread.
Every sum goes through the columns in order, and so the bits of a row depend neither on the number of rows nor on where
in a tile it is.

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how tests compare them.
Shapes: B layers side by side, P columns of a block, R rows. Columns are [B, P, R], or views of some of the C columns of
[B, C, R]; a row of such an array is contiguous. Pointers are to float32 unless the text says otherwise.
"""

import triton
import triton.language as tl

__all__ = ["ROWS", "move_columns", "move_scale", "round_columns"]

ROWS = 32
"""Rows of a program: a warp. With one row a thread, what a thread reads is what it wrote."""
_ROUNDER = tl.constexpr(1.5 * 2**23)
"""A float32 plus this has no digits behind the point: adding and subtracting it rounds, halves to even."""
_TINY = tl.constexpr(2.0**-126)
_HUGE = tl.constexpr(3.4028234663852886e38)
_SIZES = [
    "q_min", "q_max", "num_columns", "num_rows", "scale_stride", "layer_stride", "slope_stride", "matrix_stride",
    "before_stride", "column_stride", "place_stride",
]  # fmt: skip
"""Arguments for whose values no kernel of its own is compiled."""


@triton.jit
def _nearest(t, low, high):
    """The integer within bounds that is nearest. Bounds are integers of few digits, so that they may come first."""
    t = tl.maximum(t, low, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(t, high, propagate_nan=tl.PropagateNan.ALL)
    return (t + _ROUNDER) - _ROUNDER


@triton.jit
def _to_bfloat16(x):
    """The bfloat16 that is nearest, halves to even. Triton's interpreter would cut digits off where a GPU rounds."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _sum_of_moves(M, before_stride, moves, column, num_rows, rows, is_row):
    """Σ_{j<i} M_ji m_j for a column i and its rows, by rising j. M points to M_0i."""
    total = tl.zeros_like(rows).to(tl.float32)
    for before in tl.range(0, column, loop_unroll_factor=8):
        move = tl.load(moves + before * num_rows + rows, mask=is_row, other=0.0)
        total = tl.fma(tl.load(M + before * before_stride), move, total)
    return total


@triton.jit(do_not_specialize=_SIZES)
def round_columns(
    M, T, W, scale, zero, group, E, Q,
    q_min, q_max, num_columns, num_rows, scale_stride, layer_stride, slope_stride, matrix_stride, before_stride,
    column_stride, place_stride, ROWS: tl.constexpr,
):  # fmt: skip
    """Round the columns of a block by GPTQ: eq. 1 to 3 of `gptq`.

    M are couplings [B, P, P], of which the part above the diagonal is read; T is what the columns want [B, P, R],
    errors of earlier blocks made up for; W weights; scale and zero those of all groups [B, G, R]; group the group of
    each column, int64 [B, C]. Written are the errors E, and the integers Q, int8.
    """
    rows, layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    is_row = rows < num_rows
    M += layer * matrix_stride
    T += layer * slope_stride
    W, E, Q = W + layer * layer_stride, E + layer * layer_stride, Q + layer * layer_stride
    group += layer * place_stride
    for column in range(num_columns):
        at = column * num_rows + rows
        k = layer * scale_stride + tl.load(group + column) * num_rows + rows
        s, z = tl.load(scale + k, mask=is_row, other=1.0), tl.load(zero + k, mask=is_row, other=0.0)
        w, t = tl.load(W + at, mask=is_row, other=0.0), tl.load(T + at, mask=is_row, other=0.0)
        t += _sum_of_moves(M + column * column_stride, before_stride, E, column, num_rows, rows, is_row)  # eq. 1
        v = _nearest(tl.div_rn(t, s), q_min - z, q_max - z)  # eq. 2
        tl.store(E + at, tl.fma(-v, s, w), mask=is_row)  # eq. 3
        tl.store(Q + at, (v + z).to(tl.int8), mask=is_row)


@triton.jit(do_not_specialize=_SIZES)
def move_scale(
    V, E, E_rounded, G, HV, damping, scale, gain, error, change,
    caution, num_columns, num_rows, scale_stride, layer_stride, slope_stride,
    SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Refit the scale of a group: eq. 1 to 3 of `refine` for scales.

    V are integers, E errors, G slopes, HV the group's part of H V, damping that of each layer [B], scale the group's
    [B, R] in an array [B, G, R]. Brought up to date are E, E_rounded if there is one, G, the scale, and the sums by row
    of what errors were and fell by, error and gain [B, R]. Written is the change of ŵ.
    """
    rows, layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    is_row = rows < num_rows
    V, E, G = V + layer * layer_stride, E + layer * layer_stride, G + layer * slope_stride
    HV, change = HV + layer * num_columns * num_rows, change + layer * num_columns * num_rows
    row, own_damping = layer * num_rows + rows, tl.load(damping + layer)
    slope, curvature, met = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for column in range(num_columns):
        at = column * num_rows + rows
        v, g = tl.load(V + at, mask=is_row, other=0.0), tl.load(G + at, mask=is_row, other=0.0)
        hv = tl.fma(own_damping, v, tl.load(HV + at, mask=is_row, other=0.0))
        slope, curvature = tl.fma(g, v, slope), tl.fma(hv, v, curvature)
        met = tl.fma(tl.load(E + at, mask=is_row, other=0.0), g, met)
    at_scale = layer * scale_stride + rows
    s = tl.load(scale + at_scale, mask=is_row, other=1.0)
    wanted = (s + tl.div_rn(slope, tl.maximum(curvature, _TINY))).to(SCALE).to(tl.float32)  # eq. 1
    step = wanted - s
    fall = step * (2 * caution * slope - step * curvature)  # eq. 2
    moves = (fall > 0) & (wanted * s > 0)
    step = tl.where(moves, step, 0.0)
    tl.store(scale + at_scale, s + step, mask=is_row)
    tl.store(gain + row, tl.load(gain + row, mask=is_row, other=0.0) + tl.where(moves, fall, 0.0), mask=is_row)
    tl.store(error + row, tl.load(error + row, mask=is_row, other=0.0) + met, mask=is_row)
    for column in range(num_columns):
        at = column * num_rows + rows
        v, g = tl.load(V + at, mask=is_row, other=0.0), tl.load(G + at, mask=is_row, other=0.0)
        hv = tl.fma(own_damping, v, tl.load(HV + at, mask=is_row, other=0.0))
        moved = v * step
        left = tl.load(E + at, mask=is_row, other=0.0) - moved
        tl.store(change + at, moved, mask=is_row)
        tl.store(E + at, left, mask=is_row)
        if E_rounded is not None:
            tl.store(E_rounded + layer * layer_stride + at, _to_bfloat16(left), mask=is_row)
        tl.store(G + at, tl.fma(-hv, step, g), mask=is_row)  # eq. 3


@triton.jit(do_not_specialize=_SIZES)
def move_columns(
    H, V, E, E_rounded, G, steps, scale, low, high, gain, change,
    caution, num_columns, num_rows, scale_stride, layer_stride, slope_stride, matrix_stride, before_stride,
    column_stride, place_stride, ROWS: tl.constexpr,
):  # fmt: skip
    """Choose the integers of some columns of a group anew: eq. 4 to 7 of `refine`.

    H are the Hessians' squares of these columns, G their slopes, steps the caution over A_ii of all columns [B, C];
    scale, low and high are the group's [B, R] in arrays [B, G, R]. Brought up to date are V, E, E_rounded if there is
    one, and gain [B, R]. Written is the change of ŵ. Eq. 5 is used for slopes: (e A)_j ← (e A)_j − d_i s A_ij.
    """
    rows, layer = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    is_row = rows < num_rows
    H, G, steps = H + layer * matrix_stride, G + layer * slope_stride, steps + layer * place_stride
    V, E, change = V + layer * layer_stride, E + layer * layer_stride, change + layer * num_columns * num_rows
    at_scale, row = layer * scale_stride + rows, layer * num_rows + rows
    s = tl.load(scale + at_scale, mask=is_row, other=1.0)
    least, most = tl.load(low + at_scale, mask=is_row, other=0.0), tl.load(high + at_scale, mask=is_row, other=0.0)
    gains = tl.zeros([ROWS], tl.float32)
    for column in range(num_columns):
        at, share = column * num_rows + rows, tl.load(steps + column)
        v, g = tl.load(V + at, mask=is_row, other=0.0), tl.load(G + at, mask=is_row, other=0.0)
        g -= _sum_of_moves(H + column * column_stride, before_stride, change, column, num_rows, rows, is_row)  # eq. 5
        t = tl.div_rn(g, s) * share  # eq. 4
        d = _nearest(t, least - v, most - v)  # eq. 6
        moved = d * s
        left = tl.load(E + at, mask=is_row, other=0.0) - moved
        tl.store(V + at, v + d, mask=is_row)
        tl.store(change + at, moved, mask=is_row)
        tl.store(E + at, left, mask=is_row)
        if E_rounded is not None:
            tl.store(E_rounded + layer * layer_stride + at, _to_bfloat16(left), mask=is_row)
        gains = tl.fma(d, tl.div_rn(2 * t - caution * d, share), gains)  # eq. 7
    # For the least of scales what is wanted is infinite.
    gains = tl.minimum(tl.where(gains == gains, gains, 0.0), _HUGE)
    tl.store(gain + row, tl.fma(gains, s * s, tl.load(gain + row, mask=is_row, other=0.0)), mask=is_row)
