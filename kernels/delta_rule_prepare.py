# SPDX-License-Identifier: Apache-2.0
"""What the delta rule's chunks need and no state enters: one launch, parallel over chunks, for forward and backward.

With r = 1/|k| (or 1 without qk_l2norm), G the running sum of g inside the chunk, and rows i, columns j of a chunk:

    M_ij = e^{G_i - G_j} [(I + strictLower(diag(beta) K^ K^^T))^{-1}]_ij, i > j         K^ = r K
    P_ij = scale e^{G_i - G_j} (q^_i . k^_j), i >= j
    a = e^G r_k       b = scale e^G r_q       c = e^{G_C - G} r_k       decay = e^{G_C}

The gate is a diagonal similarity, so the inverse does not see it (reference/delta_rule.md). M and P are stored in the
input dtype, zero outside the live lower triangle, so that rows behind a sequence's end add nothing to any product; the
inverse, the exponents and the row factors are float32 (float64 for float64). M leaves out the ones of the diagonal: a
product with the inverse is x + M x, whose first term needs no rounding. beta is copied beside the row factors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._config import delta_rule_prepare_config
from ._launch import arch, on_device, precision
from ._tiles import cast, dot, first_slot, not_finite, sequence_bounds, sequence_of_slot


@triton.jit
def _quarters(x, n: tl.constexpr):
    """The blocks (0, 0), (1, 0) and (1, 1) of x [2n, 2n]."""
    left, right = tl.split(tl.permute(tl.reshape(x, (2, n, 2, n)), (1, 3, 0, 2)))
    x00, x10 = tl.split(left)
    _, x11 = tl.split(right)
    return x00, x10, x11


@triton.jit
def _from_quarters(x00, x10, x11, n: tl.constexpr):
    """The lower triangular [2n, 2n] with these blocks."""
    x = tl.join(tl.join(x00, x10), tl.join(tl.zeros_like(x00), x11))  # [n, n, row block, column block]
    return tl.reshape(tl.permute(x, (2, 0, 3, 1)), (2 * n, 2 * n))


@triton.jit
def _substitute(A):
    """(I + A)^{-1} of strictly lower triangular blocks A [16, 16, blocks], all at once, by forward substitution."""
    row = tl.arange(0, 16)[:, None, None]
    column = tl.arange(0, 16)[None, :, None]
    X = tl.where(row == column, 1.0, tl.zeros_like(A))
    for j in tl.range(15):  # not unrolled: fewer registers
        below = tl.sum(tl.where(column == j, A, 0.0), 1)  # column j of A
        done = tl.sum(tl.where(row == j, X, 0.0), 0)  # row j of X, which no later step changes
        X = tl.where(row > j, X - below[:, None, :] * done[None, :, :], X)
    return X


@triton.jit
def _merge(X00, A10, X11, PRECISION: tl.constexpr):
    """The block (1, 0) of (I + A)^{-1} from the inverses of the diagonal blocks."""
    return -dot(X11, dot(A10, X00, None, PRECISION), None, PRECISION)


@triton.jit
def _inverse(A, PRECISION: tl.constexpr):
    """(I + A)^{-1} of one strictly lower triangular block [16, 16] or [32, 32]."""
    if A.shape[0] == 16:
        return tl.reshape(_substitute(tl.reshape(A, (16, 16, 1))), (16, 16))
    else:
        A00, A10, A11 = _quarters(A, 16)
        X00, X11 = tl.split(_substitute(tl.join(A00, A11)))
        return _from_quarters(X00, _merge(X00, A10, X11, PRECISION), X11, 16)


@triton.jit
def _inverse_of_two(A, B, PRECISION: tl.constexpr):
    """`_inverse` of two blocks [32, 32]; the substitution, a chain of short steps, takes both at once."""
    A00, A10, A11 = _quarters(A, 16)
    B00, B10, B11 = _quarters(B, 16)
    blocks = tl.reshape(tl.join(tl.join(A00, A11), tl.join(B00, B11)), (16, 16, 4))
    X, Y = tl.split(tl.reshape(_substitute(blocks), (16, 16, 2, 2)))
    A00, A11 = tl.split(X)
    B00, B11 = tl.split(Y)
    A = _from_quarters(A00, _merge(A00, A10, A11, PRECISION), A11, 16)
    B = _from_quarters(B00, _merge(B00, B10, B11, PRECISION), B11, 16)
    return A, B


@triton.jit
def _load_rows(x, stride, row, live, first, K: tl.constexpr, BK: tl.constexpr):
    d = first + tl.arange(0, BK)
    mask = (row < live)[:, None] & (d < K)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _square(x, compute: tl.constexpr):
    x = x.to(compute)
    return tl.sum(x * x, 1)


@triton.jit
def _gates(gate):
    """Sums of g over (j, i] for i >= j, over [0, i], over (j, end) and over all, each added up by itself.

    Never differences of sums: those are wrong behind g = -1e4 and NaN behind -inf.
    """
    i = tl.arange(0, gate.shape[0])[:, None]
    j = tl.arange(0, gate.shape[0])[None, :]
    later = tl.where(i > j, gate[:, None], 0.0)
    upto = tl.sum(tl.where(i >= j, gate[None, :], 0.0), 1)
    return tl.cumsum(later, 0), upto, tl.sum(later, 0), tl.sum(gate, 0)


@triton.jit
def _first_bad(bad, row, none):
    """The first row with a True, or `none`."""
    return tl.min(tl.where(tl.max(bad.to(tl.int32), 1) > 0, row, none), 0)


@triton.jit
def _store_block(x, tile, row, column, live, BT: tl.constexpr):
    """One block of a lower triangular [BT, BT], zero outside of its live rows."""
    i = row[:, None]
    j = column[None, :]
    tl.store(x + i * BT + j, cast(tl.where((i < live) & (i >= j), tile, 0.0), x.dtype.element_ty))


@triton.jit
def _decays(between, row, column, live):
    """e^between on and below the diagonal; above it, where gates have no say, nothing overflows."""
    return tl.exp(tl.where((row[:, None] < live) & (row[:, None] >= column[None, :]), between, 0.0))


@triton.jit
def _store_M(M, inverse, decays, row, column, live, first_bad, BT: tl.constexpr):
    below = tl.where(row[:, None] > column[None, :], inverse * decays, 0.0)
    _store_block(M, tl.where((row < first_bad)[:, None], below, float("nan")), row, column, live, BT)


@triton.jit
def _store_gamma(gamma, decays, row, column, BT: tl.constexpr):
    """One block on or below the diagonal of a [BT, BT] that is mirrored at it."""
    i = row[:, None]
    j = column[None, :]
    tile = cast(decays, gamma.dtype.element_ty)
    tl.store(gamma + i * BT + j, tile, mask=i >= j)
    tl.store(gamma + j * BT + i, tile, mask=i > j)


@triton.jit
def _store_norms(norms, step, row, live, k_norm, q_square):
    tl.store(norms + row, k_norm, mask=row < live)
    tl.store(norms + row + step, 1 / tl.sqrt(q_square + 1e-6), mask=row < live)


@triton.jit
def _store_factors(factors, step, row, live, before, after, k_norm, b_norm, rate):
    """a, b and c of some rows, from the sums of g before and after them, and beta."""
    entry = tl.exp(before)
    tl.store(factors + row, entry * k_norm, mask=row < live)
    tl.store(factors + row + step, entry * b_norm, mask=row < live)
    tl.store(factors + row + 2 * step, tl.exp(after) * k_norm, mask=row < live)
    tl.store(factors + row + 3 * step, rate, mask=row < live)


@triton.jit(do_not_specialize=["T", "N", "slots", "q_b", "k_b", "beta_b", "g_b", "scale"])
def prepare_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    beta,  # [B, T, HV]
    g,  # [B, T, HV] or None
    M,  # [slots, HV, BT, BT]
    P,  # [slots, HV, BT, BT]
    factors,  # [4, B, HV, T]: a, b, c, beta
    decay,  # [slots, HV]
    gamma,  # [slots, HV, BT, BT] or None
    norms,  # [2, B, HV, T] or None
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    N,
    slots,
    group,  # HV // H
    q_b,  # strides of the inputs
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    beta_b,
    beta_t,
    beta_h,
    g_b,
    g_t,
    g_h,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # live rows of a chunk, at most BT
    BT: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,  # batch strides of q and k are multiples of this
    QK_L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
):
    slot = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    HV = tl.num_programs(1)
    compute = factors.dtype.element_ty
    if cu_seqlens is None:
        batch = slot // tl.cdiv(T, ROWS)
        start = tl.cast(0, tl.int64)
        length = T
        chunk = slot % tl.cdiv(T, ROWS)
    else:
        batch = 0
        n = sequence_of_slot(cu_seqlens, slot, N, T, ROWS)
        start, length = sequence_bounds(cu_seqlens, n, T)
        chunk = slot - first_slot(start, n, ROWS)
    if chunk * ROWS >= length:
        return
    live = tl.minimum(length - chunk * ROWS, ROWS)
    token = start + chunk * ROWS  # of row 0
    batch = batch.to(tl.int64)

    # A chunk of 64 rows is taken in two halves: no tile is larger than 32 x 32, and none above the diagonal is made.
    HALF: tl.constexpr = min(BT, 32)
    TWO: tl.constexpr = BT > HALF
    row = tl.arange(0, HALF)
    row1 = row + HALF
    lower = row[:, None] > row[None, :]

    q += tl.multiple_of(batch * q_b, ALIGN) + token * q_t + (head // group) * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + (head // group) * k_h
    zero = tl.zeros((HALF, HALF), compute)
    none = tl.zeros((HALF,), compute)
    kk00, qk00, kk10, qk10, kk11, qk11 = zero, zero, zero, zero, zero, zero
    k0_square, q0_square, k1_square, q1_square = none, none, none, none
    for first in tl.range(0, K, BK):
        k0 = _load_rows(k, k_t, row, live, first, K, BK)
        q0 = _load_rows(q, q_t, row, live, first, K, BK)
        kk00 = dot(k0, tl.trans(k0), kk00, PRECISION)
        qk00 = dot(q0, tl.trans(k0), qk00, PRECISION)
        if QK_L2NORM:
            k0_square += _square(k0, compute)
            q0_square += _square(q0, compute)
        if TWO:
            k1 = _load_rows(k, k_t, row1, live, first, K, BK)
            q1 = _load_rows(q, q_t, row1, live, first, K, BK)
            kk10 = dot(k1, tl.trans(k0), kk10, PRECISION)
            qk10 = dot(q1, tl.trans(k0), qk10, PRECISION)
            kk11 = dot(k1, tl.trans(k1), kk11, PRECISION)
            qk11 = dot(q1, tl.trans(k1), qk11, PRECISION)
            if QK_L2NORM:
                k1_square += _square(k1, compute)
                q1_square += _square(q1, compute)
    # r_k and scale r_q of each row
    k0_norm = 1 / tl.sqrt(k0_square + 1e-6) if QK_L2NORM else none + 1
    q0_norm = scale / tl.sqrt(q0_square + 1e-6) if QK_L2NORM else none + scale
    k1_norm = 1 / tl.sqrt(k1_square + 1e-6) if QK_L2NORM else none + 1
    q1_norm = scale / tl.sqrt(q1_square + 1e-6) if QK_L2NORM else none + scale
    kk00 = kk00 * k0_norm[:, None] * k0_norm[None, :]
    qk00 = qk00 * q0_norm[:, None] * k0_norm[None, :]
    kk10 = kk10 * k1_norm[:, None] * k0_norm[None, :]
    qk10 = qk10 * q1_norm[:, None] * k0_norm[None, :]
    kk11 = kk11 * k1_norm[:, None] * k1_norm[None, :]
    qk11 = qk11 * q1_norm[:, None] * k1_norm[None, :]

    line = HV.to(tl.int64) * T  # one factor of one batch row
    step = line * (slots // tl.cdiv(T, ROWS) if cu_seqlens is None else 1)
    here = tl.cast(slot, tl.int64) * HV + head
    M += here * (BT * BT)
    P += here * (BT * BT)
    factors += batch * line + head * T + token
    rates = beta + batch * beta_b + token * beta_t + head * beta_h
    rate0 = tl.load(rates + row.to(tl.int64) * beta_t, mask=row < live, other=0.0).to(compute)
    rate1 = none
    between00, upto0, after0, whole0 = zero, none, none, tl.cast(0, compute)
    between11, upto1, after1, whole1 = zero, none, none, tl.cast(0, compute)
    gate0, gate1 = none, none
    if g is not None:
        gates = g + batch * g_b + token * g_t + head * g_h
        gate0 = tl.load(gates + row.to(tl.int64) * g_t, mask=row < live, other=0.0).to(compute)
        between00, upto0, after0, whole0 = _gates(gate0)
    A00 = rate0[:, None] * kk00
    # From the first row that is not finite on, every new value is NaN: products would spread it to earlier rows.
    bad = not_finite(tl.where(row[:, None] >= row[None, :], A00, 0.0))
    bad = bad | ((gate0 != gate0) | (gate0 == float("inf")))[:, None]
    first_bad = _first_bad(bad, row, BT)
    decays00 = _decays(between00, row, row, live)
    _store_block(P, qk00 * decays00, row, row, live, BT)
    if gamma is not None:
        gamma += here * (BT * BT)
        _store_gamma(gamma, decays00, row, row, BT)
    if norms is not None:
        norms += batch * line + head * T + token
        _store_norms(norms, step, row, live, k0_norm, q0_square)
    if TWO:
        rate1 = tl.load(rates + row1.to(tl.int64) * beta_t, mask=row1 < live, other=0.0).to(compute)
        if g is not None:
            gate1 = tl.load(gates + row1.to(tl.int64) * g_t, mask=row1 < live, other=0.0).to(compute)
            between11, upto1, after1, whole1 = _gates(gate1)
        _store_factors(factors, step, row1, live, whole0 + upto1, after1, k1_norm, q1_norm, rate1)
        A10 = rate1[:, None] * kk10
        A11 = rate1[:, None] * kk11
        bad = not_finite(A10) | not_finite(tl.where(row[:, None] >= row[None, :], A11, 0.0))
        bad = bad | ((gate1 != gate1) | (gate1 == float("inf")))[:, None]
        first_bad = tl.minimum(first_bad, _first_bad(bad, row1, BT))
        decays11 = _decays(between11, row1, row1, live)
        _store_block(P, zero, row, row1, live, BT)
        _store_block(P, qk10 * _decays(upto1[:, None] + after0[None, :], row1, row, live), row1, row, live, BT)
        _store_block(P, qk11 * decays11, row1, row1, live, BT)
        if gamma is not None:
            _store_gamma(gamma, _decays(upto1[:, None] + after0[None, :], row1, row, live), row1, row, BT)
            _store_gamma(gamma, decays11, row1, row1, BT)
        if norms is not None:
            _store_norms(norms, step, row1, live, k1_norm, q1_square)
    _store_factors(factors, step, row, live, upto0, after0 + whole1, k0_norm, q0_norm, rate0)
    tl.store(decay + here, tl.exp(whole0 + whole1))

    A00 = tl.where(lower & (row < first_bad)[:, None], A00, 0.0)
    if TWO:
        A10 = tl.where((row1 < first_bad)[:, None], A10, 0.0)
        A11 = tl.where(lower & (row1 < first_bad)[:, None], A11, 0.0)
        X00, X11 = _inverse_of_two(A00, A11, INVERSE_PRECISION)
        X10 = _merge(X00, A10, X11, INVERSE_PRECISION)
        decays10 = _decays(upto1[:, None] + after0[None, :], row1, row, live)
        _store_block(M, zero, row, row1, live, BT)
        _store_M(M, X10, decays10, row1, row, live, first_bad, BT)
        _store_M(M, X11, decays11, row1, row1, live, first_bad, BT)
    else:
        X00 = _inverse(A00, INVERSE_PRECISION)
    _store_M(M, X00, decays00, row, row, live, first_bad, BT)


class Chunks(NamedTuple):
    """What `prepare` returns; see the top of the file."""

    M: torch.Tensor  # [slots, HV, BT, BT]
    P: torch.Tensor  # [slots, HV, BT, BT]
    factors: torch.Tensor  # [4, B, HV, T]: a, b, c, beta
    decay: torch.Tensor  # [slots, HV]
    gamma: torch.Tensor | None  # [slots, HV, BT, BT]: e^{G_i - G_j}, mirrored above the diagonal
    norms: torch.Tensor | None  # [2, B, HV, T]: r_k, r_q


def chunk_slots(B: int, T: int, cu_seqlens: torch.Tensor | None, rows: int) -> int:
    """The number of chunk slots: known without reading a length of a packed sequence."""
    per_row = triton.cdiv(T, rows)
    return B * per_row if cu_seqlens is None else per_row + cu_seqlens.shape[0] - 1


def power_of_two(n: int) -> int:
    """The extent of a tile that holds n channels: products take 16 at least."""
    return max(16, triton.next_power_of_2(n))


def wider(q: torch.Tensor, v: torch.Tensor) -> torch.dtype | None:
    """The dtype that small heads are computed in instead of their own, or None.

    With a handful of channels many keys of a chunk are parallel, and a product of (1 - beta) cancels to less than the
    rounding of the chunk's sums and operands; the step loop, which sums nothing, keeps it. For such heads it costs
    little.
    """
    channels = min(q.shape[-1], v.shape[-1])
    if channels <= 8 and q.dtype != torch.float64:
        return torch.float64
    return torch.float32 if channels <= 16 and q.dtype.itemsize == 2 else None


def alignment(*tensors: torch.Tensor) -> int:
    """The elements in 16 bytes if every outer stride of the tensors is a multiple of that, else 1."""
    n = 16 // tensors[0].element_size()
    return n if all(s % n == 0 for x in tensors for s in x.stride()[:-1]) else 1


def prepare(q, k, beta, g, cu_seqlens, *, scale, qk_l2norm, forward, BT, rows=None) -> Chunks:
    """The backward also wants gamma, with a gate, and the norms, with qk_l2norm.

    `rows`: the live rows of a chunk of BT, all by default. q and k have unit stride along their last dimension.
    """
    B, T, H, K = q.shape
    HV = beta.shape[2]
    rows = rows or BT
    slots = chunk_slots(B, T, cu_seqlens, rows)
    config = delta_rule_prepare_config(K, BT, q.dtype, arch())
    compute = torch.promote_types(q.dtype, torch.float32)
    M = torch.empty(slots, HV, BT, BT, dtype=q.dtype, device=q.device)
    P = torch.empty_like(M)
    factors = torch.empty(4, B, HV, T, dtype=compute, device=q.device)
    decay = torch.empty(slots, HV, dtype=compute, device=q.device)
    gamma = None if forward or g is None else torch.empty_like(M)
    norms = torch.empty_like(factors[:2]) if qk_l2norm and not forward else None
    if slots and T:
        with on_device(q):
            prepare_kernel[(slots, HV)](
                q,
                k,
                beta,
                g,
                M,
                P,
                factors,
                decay,
                gamma,
                norms,
                cu_seqlens,
                scale,
                T,
                0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
                slots,
                HV // H,
                *q.stride()[:3],
                *k.stride()[:3],
                *beta.stride(),
                *((0, 0, 0) if g is None else g.stride()),
                K=K,
                ROWS=rows,
                BT=BT,
                BK=config.BK,
                ALIGN=alignment(q, k),
                QK_L2NORM=qk_l2norm,
                PRECISION=precision(q.dtype),
                INVERSE_PRECISION=inverse_precision(q.dtype),
                **config.options,
            )
    return Chunks(M, P, factors, decay, gamma, norms)


def inverse_precision(dtype: torch.dtype) -> str:
    """Three TF32 products are as good as float32 beside the rounding of 16-bit results; float32 gets float32."""
    return "tf32x3" if dtype.itemsize == 2 and arch().startswith("sm_") else "ieee"
