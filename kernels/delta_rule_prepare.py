# SPDX-License-Identifier: Apache-2.0
"""What the delta rule's chunks need and no state enters: one launch, parallel over chunks, for forward and backward.

With r = 1/|k| (or 1 without qk_l2norm), G the running sum of g inside the chunk, and rows i, columns j of a chunk:

    M_ij = e^{G_i - G_j} [(I + strictLower(diag(beta) K^ K^^T))^{-1}]_ij (beta_j)       K^ = r K
    P_ij = scale e^{G_i - G_j} (q^_i . k^_j), i >= j
    a = e^G r_k       b = scale e^G r_q       c = e^{G_C - G} r_k       decay = e^{G_C}

The gate is a diagonal similarity, so the inverse does not see it (reference/delta_rule.md). M and P are stored in the
input dtype, zero outside the live lower triangle, so that rows behind a sequence's end add nothing to any product; the
inverse, the exponents and the row factors are float32 (float64 for float64).
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
    for j in tl.static_range(15):
        below = tl.sum(tl.where(column == j, A, 0.0), 1)  # column j of A
        done = tl.sum(tl.where(row == j, X, 0.0), 0)  # row j of X, which no later step changes
        X = tl.where(row > j, X - below[:, None, :] * done[None, :, :], X)
    return X


@triton.jit
def _inverse_16(A):
    return tl.reshape(_substitute(tl.reshape(A, (16, 16, 1))), (16, 16))


@triton.jit
def _merge(X00, A10, X11, n: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^{-1} [2n, 2n] from the inverses of its diagonal blocks."""
    X10 = -dot(X11, dot(A10, X00, None, PRECISION), None, PRECISION)
    return _from_quarters(X00, X10, X11, n)


@triton.jit
def _inverse_32(A, PRECISION: tl.constexpr):
    A00, A10, A11 = _quarters(A, 16)
    X00, X11 = tl.split(_substitute(tl.join(A00, A11)))
    return _merge(X00, A10, X11, 16, PRECISION)


@triton.jit
def _inverse_64(A, PRECISION: tl.constexpr):
    A00, A10, A11 = _quarters(A, 32)
    B00, B10, B11 = _quarters(A00, 16)
    C00, C10, C11 = _quarters(A11, 16)
    blocks = tl.reshape(tl.join(tl.join(B00, B11), tl.join(C00, C11)), (16, 16, 4))
    X0, X1 = tl.split(tl.reshape(_substitute(blocks), (16, 16, 2, 2)))
    B00, B11 = tl.split(X0)
    C00, C11 = tl.split(X1)
    X00 = _merge(B00, B10, B11, 16, PRECISION)
    X11 = _merge(C00, C10, C11, 16, PRECISION)
    return _merge(X00, A10, X11, 32, PRECISION)


@triton.jit
def _inverse(A, PRECISION: tl.constexpr):
    """(I + A)^{-1} of a strictly lower triangular A [BT, BT]: 16 x 16 blocks by substitution, merged by products."""
    if A.shape[0] == 16:
        return _inverse_16(A)
    elif A.shape[0] == 32:
        return _inverse_32(A, PRECISION)
    else:
        return _inverse_64(A, PRECISION)


@triton.jit(do_not_specialize=["T", "N", "slots", "q_b", "k_b", "beta_b", "g_b", "scale"])
def prepare_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    beta,  # [B, T, HV]
    g,  # [B, T, HV] or None
    M,  # [slots, HV, BT, BT]
    P,  # [slots, HV, BT, BT]
    factors,  # [3, B, HV, T]: a, b, c
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
    FOLD_BETA: tl.constexpr,  # whether M has beta on its columns
    QK_L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
):
    slot = tl.program_id(0)
    head = tl.program_id(1)
    HV = tl.num_programs(1) * group
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

    row = tl.arange(0, BT)
    i = row[:, None]
    j = row[None, :]
    inside = (i < live) & (i >= j)

    q += tl.multiple_of(batch * q_b, ALIGN) + token * q_t + head * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + head * k_h
    d = tl.arange(0, BK)
    kk = tl.zeros((BT, BT), compute)
    qk = tl.zeros((BT, BT), compute)
    k_square = tl.zeros((BT,), compute)
    q_square = tl.zeros((BT,), compute)
    for first in tl.static_range(0, K, BK):
        mask = (i < live) & (first + d < K)[None, :]
        k_tile = tl.load(k + i.to(tl.int64) * k_t + (first + d)[None, :], mask=mask, other=0.0)
        q_tile = tl.load(q + i.to(tl.int64) * q_t + (first + d)[None, :], mask=mask, other=0.0)
        kk = dot(k_tile, tl.trans(k_tile), kk, PRECISION)
        qk = dot(q_tile, tl.trans(k_tile), qk, PRECISION)
        if QK_L2NORM:
            k_square += tl.sum(k_tile.to(compute) * k_tile.to(compute), 1)
            q_square += tl.sum(q_tile.to(compute) * q_tile.to(compute), 1)
    if QK_L2NORM:
        k_norm = 1 / tl.sqrt(k_square + 1e-6)
        q_norm = 1 / tl.sqrt(q_square + 1e-6)
        kk = kk * k_norm[:, None] * k_norm[None, :]
        qk = qk * q_norm[:, None] * k_norm[None, :]
    else:
        k_norm = tl.full((BT,), 1.0, compute)
        q_norm = tl.full((BT,), 1.0, compute)

    for hv in range(head * group, (head + 1) * group):
        here = tl.cast(slot, tl.int64) * HV + hv
        beta_row = beta + batch * beta_b + token * beta_t + hv * beta_h
        rate = tl.load(beta_row + row.to(tl.int64) * beta_t, mask=row < live, other=0.0).to(compute)
        A = tl.where(inside, rate[:, None] * kk, 0.0)
        bad = not_finite(A)
        if g is not None:
            g_row = g + batch * g_b + token * g_t + hv * g_h
            gate = tl.load(g_row + row.to(tl.int64) * g_t, mask=row < live, other=0.0).to(compute)
            # Each exponent is a sum of g over its own range, never a difference of sums: exact behind -inf and -1e4.
            later = tl.where(i > j, gate[:, None], 0.0)
            between = tl.exp(tl.where(inside, tl.cumsum(later, 0), 0.0))  # sum over (j, i]
            entry = tl.exp(tl.sum(tl.where(i >= j, gate[None, :], 0.0), 1))
            leave = tl.exp(tl.sum(later, 0))
            whole = tl.exp(tl.sum(gate, 0))
            bad = bad | ((gate != gate) | (gate == float("inf")))[:, None]
        else:
            between = tl.full((BT, BT), 1.0, compute)
            entry = tl.full((BT,), 1.0, compute)
            leave = tl.full((BT,), 1.0, compute)
            whole = tl.full((), 1.0, compute)

        # From the first row that is not finite on, every new value is NaN; products would spread it to the rows before.
        first_bad = tl.min(tl.min(tl.where(bad, i, BT), 1), 0)
        inverse = _inverse(tl.where((i > j) & (i < first_bad), A, 0.0), INVERSE_PRECISION)
        if FOLD_BETA:
            inverse = inverse * rate[None, :]
        m = tl.where(i < first_bad, inverse * between, float("nan"))
        at = here * (BT * BT) + i * BT + j
        tl.store(M + at, cast(tl.where(inside, m, 0.0), M.dtype.element_ty))
        tl.store(P + at, cast(tl.where(inside, scale * between * qk, 0.0), P.dtype.element_ty))

        line = tl.num_programs(1).to(tl.int64) * group * T  # of one factor of one batch row
        at = batch * line + tl.cast(hv, tl.int64) * T + token + row
        step = line * (1 if cu_seqlens is not None else slots // tl.cdiv(T, ROWS))
        tl.store(factors + at, entry * k_norm, mask=row < live)
        tl.store(factors + at + step, scale * entry * q_norm, mask=row < live)
        tl.store(factors + at + 2 * step, leave * k_norm, mask=row < live)
        tl.store(decay + here, whole)
        if norms is not None:
            tl.store(norms + at, k_norm, mask=row < live)
            tl.store(norms + at + step, q_norm, mask=row < live)
        if gamma is not None:
            at = gamma + here * (BT * BT)
            tl.store(at + i * BT + j, cast(between, gamma.dtype.element_ty), mask=i >= j)
            tl.store(at + j * BT + i, cast(between, gamma.dtype.element_ty), mask=i > j)


class Chunks(NamedTuple):
    """What `prepare` returns; see the top of the file."""

    M: torch.Tensor  # [slots, HV, BT, BT]
    P: torch.Tensor  # [slots, HV, BT, BT]
    factors: torch.Tensor  # [3, B, HV, T]: a, b, c
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


def alignment(*tensors: torch.Tensor) -> int:
    """The elements in 16 bytes if every outer stride of the tensors is a multiple of that, else 1."""
    n = 16 // tensors[0].element_size()
    return n if all(s % n == 0 for x in tensors for s in x.stride()[:-1]) else 1


def prepare(q, k, beta, g, cu_seqlens, *, scale, qk_l2norm, forward, BT, rows=None) -> Chunks:
    """The forward wants beta in M; the backward does not, and wants gamma with a gate and the norms with qk_l2norm.

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
    factors = torch.empty(3, B, HV, T, dtype=compute, device=q.device)
    decay = torch.empty(slots, HV, dtype=compute, device=q.device)
    gamma = None if forward or g is None else torch.empty_like(M)
    norms = torch.empty_like(factors[:2]) if qk_l2norm and not forward else None
    if slots and T:
        with on_device(q):
            prepare_kernel[(slots, H)](
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
                FOLD_BETA=forward,
                QK_L2NORM=qk_l2norm,
                PRECISION=precision(q.dtype),
                INVERSE_PRECISION=inverse_precision(q.dtype),
                **config.options,
            )
    return Chunks(M, P, factors, decay, gamma, norms)


def inverse_precision(dtype: torch.dtype) -> str:
    """Three TF32 products are as good as float32 beside the rounding of 16-bit results; float32 gets float32."""
    return "tf32x3" if dtype.itemsize == 2 and arch().startswith("sm_") else "ieee"
