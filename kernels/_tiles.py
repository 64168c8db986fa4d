# SPDX-License-Identifier: Apache-2.0
"""Device functions with more than one caller."""

import triton
import triton.language as tl

from . import _launch

INTERPRET = tl.constexpr(_launch.INTERPRET)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b, added to acc unless that is None; sums in float32, or float64 for float64.

    PRECISION is said at every product, because float32 would be TF32 by default. Triton's interpreter multiplies the
    bit patterns of bfloat16 operands, so they are widened there, which changes no product.
    """
    if INTERPRET:
        if a.dtype == tl.bfloat16:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
    out_dtype: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=out_dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=out_dtype)


@triton.jit
def fine_dot(a, b, acc, PRECISION: tl.constexpr):
    """`dot` of float32 tiles that are worth more than 16 bits, in TF32 or IEEE arithmetic."""
    if PRECISION == "tf32":
        a = _to_tf32(a)
        b = _to_tf32(b)
    return dot(a, b, acc, PRECISION)


@triton.jit
def _to_tf32(x):
    """x rounded to the 10 bits of mantissa that tensor cores look at; they would cut off the rest, for twice the error.

    Triton's interpreter multiplies all bits: there the rest goes.
    """
    bits = x.to(tl.uint32, bitcast=True) + 0x1000
    if INTERPRET:
        bits = bits & 0xFFFFE000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest. Triton's interpreter cuts off what bfloat16 cannot hold: round there."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            if x.dtype != tl.bfloat16:
                x = x.to(tl.float32)
                bits = x.to(tl.uint32, bitcast=True)
                rounded = bits + 0x7FFF + ((bits >> 16) & 1)
                bits = tl.where(x == x, rounded, bits | 0x400000)
                return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def not_finite(x):
    """Where x is NaN or infinite. Not as x - x != 0: for a product x that is one fused operation, its rounding error.

    Triton's interpreter compares bits of bfloat16, so it is widened, which changes no value.
    """
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return (tl.abs(x) < float("inf")) == 0


@triton.jit
def first_not_finite(x, column):
    """In each row of x [rows, columns] the number, of those in `column`, of the first that is not finite; or 2^30."""
    return tl.min(tl.where(not_finite(x), column[None, :], 1 << 30), 1)


@triton.jit
def last_not_finite(x, column):
    """In each row of x [rows, columns] the number, of those in `column`, of the last that is not finite; or -1."""
    return tl.max(tl.where(not_finite(x), column[None, :], -1), 1)


@triton.jit
def softmax_step(m, l, s):
    """The running maximum m and sum of weights l of rows that go on by scores s [rows, keys] in base 2, -inf where a
    row sees no key: (m, l, weights of these keys, factor of what was summed before)."""
    largest = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # no key has had a weight yet
    p = tl.exp2(s - safe[:, None])
    alpha = tl.exp2(m - safe)
    return largest, l * alpha + tl.sum(p, 1), p, alpha


@triton.jit
def sequence_bounds(cu_seqlens, n, T):
    """(first token, length) of packed sequence n. Bad values of cu_seqlens give wrong tokens of [0, T), no others."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), start), T)
    return start, end - start


@triton.jit
def first_slot(start, n, ROWS):
    """The first of the chunk slots of packed sequence n, which begins at token `start`.

    Chunks of ROWS tokens of N sequences get slots in an array of cdiv(T, ROWS) + N, sized without knowing any length:
    slots of different sequences never meet, since floor(end / ROWS) - floor(start / ROWS) + 1 >= cdiv(length, ROWS).
    Some slots stay unused.
    """
    return start // ROWS + n


@triton.jit
def sequence_of_slot(cu_seqlens, slot, N, T, ROWS):
    """The packed sequence that a chunk slot belongs to: the last n whose first slot is not behind it."""
    low = 0
    high = N - 1
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + middle).to(tl.int64), 0), T)
        if first_slot(start, middle, ROWS) <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def tile_source(base, rows, stride, columns, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """What `load_tile` reads [BT, BD] tiles from: a tensor descriptor, whose bounds make zeros, or a pointer."""
    if TMA:
        return tl.make_tensor_descriptor(base, [tl.maximum(rows, 1), columns], [stride, 1], [BT, BD])
    else:
        return base


@triton.jit
def load_tile(source, first, rows, stride, columns, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Rows [first, first + BT) of a source; zeros outside of [0, rows) x [0, columns)."""
    if TMA:
        return source.load([first, 0])
    else:
        row = first + tl.arange(0, BT)
        column = tl.arange(0, BD)
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        return tl.load(source + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def offset_of(chunk, size, TMA: tl.constexpr):
    """Where a chunk's part of `size` begins: coordinates of descriptors have 32 bits, offsets need 64."""
    if TMA:
        return chunk * size
    else:
        return tl.cast(chunk, tl.int64) * size


@triton.jit
def vector_source(base, size, BT: tl.constexpr, TMA: tl.constexpr):
    """What `load_vector` reads runs of BT elements from: a tensor descriptor of `size` elements, or a pointer."""
    if TMA:
        return tl.make_tensor_descriptor(base, [tl.maximum(size, 1)], [1], [BT])
    else:
        return base


@triton.jit
def load_vector(source, first, BT: tl.constexpr, TMA: tl.constexpr):
    """Elements [first, first + BT) of a source, all of which exist."""
    if TMA:
        return source.load([first])
    else:
        return tl.load(source + first + tl.arange(0, BT))


@triton.jit
def store_tile(target, x, first, rows, stride, columns, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Write x [BT, BD] to rows [first, first + rows) of a target made by `tile_source`, columns [0, columns)."""
    if TMA:
        target.store([first, 0], x)
    else:
        row = tl.arange(0, BT)
        column = tl.arange(0, BD)
        target += tl.cast(first, tl.int64) * stride
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(target + at, x, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def load_state(state, row_stride, K, columns, BK: tl.constexpr, BV: tl.constexpr):
    """A block of columns of a state [K, V], transposed: [BV, BK]."""
    key = tl.arange(0, BK)
    column = tl.arange(0, BV)
    mask = (key < K)[None, :] & (column < columns)[:, None]
    return tl.load(state + key.to(tl.int64)[None, :] * row_stride + column[:, None], mask=mask, other=0.0)


@triton.jit
def store_state(state, S, row_stride, K, columns, BK: tl.constexpr, BV: tl.constexpr):
    key = tl.arange(0, BK)
    column = tl.arange(0, BV)
    mask = (key < K)[None, :] & (column < columns)[:, None]
    tl.store(state + key[None, :] * row_stride + column[:, None], S, mask=mask)


@triton.jit
def first_of(cu_seqlens, n, start, T, ROWS):
    """The first slot of sequence n, in an array with one slot for ROWS tokens."""
    if cu_seqlens is None:
        return tl.cast(n, tl.int64) * tl.cdiv(T, ROWS)
    else:
        return first_slot(start, n, ROWS)


@triton.jit
def segment_of_slot(slot, cu_seqlens, N, T, TOKENS, SPLIT: tl.constexpr):
    """(sequence, batch row, first token, length, segment) of the slot of a segment of TOKENS tokens.

    The segment is negative where the first sequence does not start at 0, as it should, for the slots before it.
    """
    if cu_seqlens is None:
        segments = tl.maximum(tl.cdiv(T, TOKENS), 1) if SPLIT else 1
        n = (slot // segments).to(tl.int64)
        return n, n, tl.cast(0, tl.int64), tl.cast(T, tl.int32), slot % segments
    else:
        n = sequence_of_slot(cu_seqlens, slot, N, T, TOKENS) if SPLIT else slot
        start, length = sequence_bounds(cu_seqlens, n, T)
        segment = slot - first_slot(start, n, TOKENS) if SPLIT else 0
        return tl.cast(n, tl.int64), tl.cast(0, tl.int64), start, length.to(tl.int32), tl.cast(segment, tl.int32)


@triton.jit
def zero_rows(o, first, last, row_stride, columns, BT: tl.constexpr, BV: tl.constexpr):
    column = tl.arange(0, BV)
    for token in range(first, last, BT):
        row = token + tl.arange(0, BT)
        mask = (row < last)[:, None] & (column < columns)[None, :]
        zero = tl.zeros((BT, BV), o.dtype.element_ty)
        tl.store(o + row.to(tl.int64)[:, None] * row_stride + column[None, :], zero, mask=mask)
