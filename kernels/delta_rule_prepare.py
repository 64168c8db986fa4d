# SPDX-License-Identifier: Apache-2.0
"""What the delta rule's chunks need and no state enters: one launch, parallel over chunks, for forward and backward.

With r = 1/|k| (or 1 without qk_l2norm), G the running sum of g inside the chunk, and rows i, columns j of a chunk:

    M_ij = e^{G_i - G_j} [(I + strictLower(diag(beta) K^ K^^T))^{-1}]_ij, i > j         K^ = r K
    P_ij = scale e^{G_i - G_j} (q^_i . k^_j), i >= j
    a = e^G r_k       b = scale e^G r_q       c = e^{G_C - G} r_k       decay = e^{G_C}

The gate is a diagonal similarity, so the inverse does not see it (reference/delta_rule.md). M and P are stored in the
input dtype and transposed, [j, i], zero outside the live triangle, so that rows behind a sequence's end add nothing to
any product; the inverse, the exponents and the row factors are float32 (float64 for float64). M leaves out the ones of
the diagonal: a product with the inverse is x + M x, whose first term needs no rounding. beta is copied beside the row
factors. Of DeltaProduct's rows only every n-th has a query: P has a column, and b an element, a query.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._config import delta_rule_prepare_config
from ._launch import arch, chunk_slots, constexprs, launch, on_device, precision
from ._tiles import cast, dot, fine_dot, first_slot, not_finite, sequence_bounds, sequence_of_slot


@triton.jit
def _substitute(blocks, BT: tl.constexpr, compute: tl.constexpr):
    """The inverses of I + A_b for the BT / 16 strictly lower triangular diagonal blocks A_b [16, 16] at `blocks`.

    By forward substitution, row by row. Returns [BT, 16], row r being column r % 16 of the inverse of block r // 16: a
    thread or a few hold what a step multiplies, and rows of A, which all columns of a block read, come from memory.
    """
    r = tl.arange(0, BT)
    j = tl.arange(0, 16)[None, :]
    X = tl.where(j == (r % 16)[:, None], 1.0, tl.zeros((BT, 16), compute))
    for i in tl.static_range(1, 16):
        A_row = tl.load(blocks + (r // 16 * 16 + i)[:, None] * 16 + j)
        X = tl.where(j == i, X - tl.sum(A_row * X, 1)[:, None], X)
    return X


@triton.jit
def _in_blocks(x, BT: tl.constexpr):
    """[BT, BT] with x [BT, 16] as its blocks of 16 columns, all of them alike."""
    if BT == 16:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None, :], (BT, BT // 16, 16)), (BT, BT))


@triton.jit
def _transposed_inverse(A, scratch, BT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^{-T} of a strictly lower triangular matrix whose transpose is A [BT, BT]; A's diagonal is not looked at.

    With D the inverse of the diagonal blocks and L what lies below them, (I + A)^{-1} = D (I + L D)^{-1}, and L D is
    nilpotent: three steps of Z <- D - Z (L D), here of the transposes, end it for four blocks.
    """
    j = tl.arange(0, BT)[:, None]
    i = tl.arange(0, BT)[None, :]
    diagonal = j // 16 == i // 16
    tl.store(scratch + i * 16 + j % 16, tl.where(j < i, A, 0.0), mask=diagonal)
    tl.debug_barrier()  # other threads read what one stored
    X = _substitute(scratch, BT, A.dtype)
    if BT == 16:
        return X
    else:
        D = tl.where(diagonal, _in_blocks(X, BT), 0.0)
        N = fine_dot(tl.where(diagonal, 0.0, A), D, None, PRECISION)
        Z = D
        for _ in tl.static_range(BT // 16 - 1):
            Z = D - fine_dot(Z, N, None, PRECISION)
        return Z


@triton.jit
def _decays(gates, gate, BT: tl.constexpr):
    """[j, i], i >= j: e to the sum of g over (j, i], from sums of g that are each added up by themselves.

    Never from differences of sums: those are wrong behind g = -1e4 and NaN behind -inf. Inside of blocks of 16 there is
    a sum for each pair; from block to block it is the product of three factors: to the end of j's block, over whole
    blocks, and from the start of i's. `gates` is `gate` [BT] in memory.
    """
    row = tl.arange(0, BT)
    t = tl.arange(0, 16)[None, :]
    inside = tl.load(gates + ((row // 16 * 16)[:, None] + t), mask=t > (row % 16)[:, None], other=0.0)
    inside = tl.exp(tl.cumsum(inside, 1))
    if BT == 16:
        return inside
    else:
        J = (row // 16)[:, None]
        I = (row // 16)[None, :]
        # The last column of `inside` is the factor to the end of the block.
        to_end = tl.sum(tl.where(t == 15, inside, 0.0), 1)
        from_start = tl.exp(tl.reshape(tl.cumsum(tl.reshape(gate, (BT // 16, 16)), 1), (BT,)))
        across = to_end[:, None] * from_start[None, :]
        for b in tl.static_range(1, BT // 16 - 1):
            over = tl.exp(tl.sum(tl.where(row // 16 == b, gate, 0.0), 0))
            across = tl.where((b > J) & (b < I), across * over, across)
        return tl.where(J == I, _in_blocks(inside, BT), across)


@triton.jit
def _load_rows(x, stride, row, live, first, K: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr):
    """Rows of keys, or where STEPS > 1 of queries: those of the last of so many rows, zeros in the others."""
    d = first + tl.arange(0, BK)
    mask = ((row < live) & (row % STEPS == STEPS - 1))[:, None] & (d < K)[None, :]
    return tl.load(x + (row // STEPS).to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tokens(to, x, row, STEPS: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr):
    """Store the last of each STEPS columns of x, `row` [.., BT], side by side, and zeros behind them up to BQ."""
    tl.store(to + row // STEPS, x, mask=row % STEPS == STEPS - 1)
    if BT // STEPS < BQ:
        behind = BT // STEPS + row
        tl.store(to + behind, tl.zeros_like(x), mask=behind < BQ)


@triton.jit
def _diagonal(x, j, i):
    return tl.sum(tl.where(j == i, x, 0.0), 1)


@triton.jit(do_not_specialize=["T", "N", "q_b", "k_b", "beta_b", "g_b", "scale"])
def prepare_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    beta,  # [B, T, HV]
    g,  # [B, T, HV] or None
    M,  # [slots, HV, BT, BT]
    P,  # [slots, HV, BT, BQ]
    factors,  # [slots, HV, 4, BT]: a, b, c, beta
    decay,  # [slots, HV]
    gamma,  # [slots, HV, BT, BT] or None
    norms,  # [slots, HV, 2, BT] or None
    largest,  # [slots, HV] or None
    scratch,  # [slots, HV, 17, BT]
    cu_seqlens,  # [N + 1] or None
    scale,
    T,
    N,
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
    STEPS: tl.constexpr,  # rows of k and beta for one of q and g: T and cu_seqlens count the former
    ROWS: tl.constexpr,  # live rows of a chunk, at most BT, a multiple of STEPS
    BT: tl.constexpr,
    BQ: tl.constexpr,
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
    if (chunk < 0) | (chunk * ROWS >= length):
        return
    live = tl.minimum(length - chunk * ROWS, ROWS)
    token = start + chunk * ROWS  # of row 0
    batch = batch.to(tl.int64)

    # Matrices are transposed, [key's row j, later row i]. Rows behind the live ones are zero from the loads on.
    row = tl.arange(0, BT)
    j = row[:, None]
    i = row[None, :]
    alive = row < live
    q += tl.multiple_of(batch * q_b, ALIGN) + token // STEPS * q_t + (head // group) * q_h
    k += tl.multiple_of(batch * k_b, ALIGN) + token * k_t + (head // group) * k_h
    kk = tl.zeros((BT, BT), compute)
    kq = tl.zeros((BT, BT), compute)
    qq = tl.zeros((BT, BT), compute)
    for first in tl.static_range(0, K, BK):
        k_tile = _load_rows(k, k_t, row, live, first, K, BK, 1)
        q_tile = _load_rows(q, q_t, row, live, first, K, BK, STEPS)
        kk = dot(k_tile, tl.trans(k_tile), kk, PRECISION)
        kq = dot(k_tile, tl.trans(q_tile), kq, PRECISION)
        if QK_L2NORM:
            qq = dot(q_tile, tl.trans(q_tile), qq, PRECISION)
    # r_k and r_q of each row
    k_square = _diagonal(kk, j, i)
    k_norm = 1 / tl.sqrt(k_square + 1e-6) if QK_L2NORM else tl.zeros((BT,), compute) + 1
    q_norm = 1 / tl.sqrt(_diagonal(qq, j, i) + 1e-6) if QK_L2NORM else k_norm

    here = tl.cast(slot, tl.int64) * HV + head
    rates = beta + batch * beta_b + token * beta_t + head * beta_h
    rate = tl.load(rates + row * beta_t, mask=alive, other=0.0).to(compute)
    gate = tl.zeros((BT,), compute)
    before = tl.where(alive, gate, float("-inf"))
    after = before
    tile = here * (BT * BT) + j * BT + i
    kq *= k_norm[:, None] * (scale * q_norm)[None, :]
    if g is not None:
        gates = g + batch * g_b + token // STEPS * g_t + head * g_h  # a token's gate is that of its first row
        gate = tl.load(gates + row // STEPS * g_t, mask=alive & (row % STEPS == 0), other=0.0).to(compute)
        line = scratch + here * (17 * BT) + 16 * BT  # without strides, and every row for every thread
        tl.store(line + row, gate)
        tl.debug_barrier()
        before += tl.cumsum(gate, 0)
        after += tl.cumsum(tl.load(line + row + 1, mask=row < BT - 1, other=0.0), 0, reverse=True)
        decays = _decays(line, gate, BT)
        kq *= decays
        if gamma is not None:
            tl.store(gamma + tile, cast(decays, gamma.dtype.element_ty))
    # What lies above the diagonal, whatever it is, is left out, not multiplied by 0.
    _store_tokens(P + here * (BT * BQ) + j * BQ, cast(tl.where(j <= i, kq, 0.0), P.dtype.element_ty), i, STEPS, BT, BQ)

    entry = tl.exp(before)
    factors += here * (4 * BT)
    a = entry * k_norm
    b = entry * (scale * q_norm)
    _store_tokens(factors + BT, b, row, STEPS, BT, BT)
    factors += row
    tl.store(factors, a)
    tl.store(factors + 2 * BT, tl.exp(after) * k_norm)
    tl.store(factors + 3 * BT, rate)
    tl.store(decay + here, tl.exp(tl.sum(gate, 0)))
    if largest is not None:
        # Not that of a zero row under qk_l2norm, 1000, which would make all others small.
        factor = tl.minimum(tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 0), 1.2e-38), 8.0)
        bits = factor.to(tl.int32, bitcast=True) & 0x7F800000
        tl.store(largest + here, bits.to(tl.float32, bitcast=True))
    if norms is not None:
        tl.store(norms + here * (2 * BT) + row, k_norm)
        tl.store(norms + here * (2 * BT) + BT + row, q_norm)

    A = tl.where(j <= i, kk * k_norm[:, None] * (k_norm * rate)[None, :], 0.0)
    # From the first row that is not finite on, every new value is NaN: products would spread it to earlier rows.
    # No product of keys is larger than the largest square of one so far.
    lost = not_finite(tl.cumsum(k_square * k_norm * k_norm, 0) * rate) | (before != before) | (before == float("inf"))
    first_lost = tl.min(tl.where(lost, row, BT), 0)
    if first_lost < BT:
        A = tl.where(i < first_lost, A, 0.0)
    inverse = _transposed_inverse(A, scratch + here * (17 * BT), BT, INVERSE_PRECISION)
    if g is not None:
        inverse *= decays
    if first_lost < BT:
        inverse = tl.where((i >= first_lost) & (i < live), float("nan"), inverse)
    diagonal = tl.where((i >= first_lost) & (i < live), float("nan"), 0.0)
    tl.store(M + tile, cast(tl.where(j < i, inverse, tl.where(j == i, diagonal, 0.0)), M.dtype.element_ty))


class Chunks(NamedTuple):
    """What `prepare` returns; see the top of the file."""

    M: torch.Tensor  # [slots, HV, BT, BT]
    P: torch.Tensor  # [slots, HV, BT, BQ]
    factors: torch.Tensor  # [slots, HV, 4, BT]: a, b, c, beta; zeros behind the live rows; of b the first BQ are used
    decay: torch.Tensor  # [slots, HV]
    gamma: torch.Tensor | None  # [slots, HV, BT, BT]: e^{G_i - G_j} at [j, i], i >= j
    norms: torch.Tensor | None  # [slots, HV, 2, BT]: r_k, r_q
    largest: torch.Tensor | None  # [slots, HV]: about the largest of a and b, a power of two


def in_rows(cu_seqlens: torch.Tensor | None, steps: int) -> torch.Tensor | None:
    """Boundaries of packed sequences in rows of k, of which a token has `steps`."""
    return cu_seqlens if cu_seqlens is None or steps == 1 else cu_seqlens * steps


def power_of_two(n: int) -> int:
    """The extent of a tile that holds n channels: products take 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def query_rows(BT: int, steps: int) -> int:
    """BQ, the extent of a tile that holds the queries of a chunk of BT rows of keys: one for `steps` of them."""
    return BT if steps == 1 else power_of_two(BT // steps)


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


def padded_sizes(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """(K, V) that 16-bit heads are computed with: rows of whole 16 bytes. Channels of zeros change no other result.

    Narrower loads are slow everywhere, and on an H200 Triton 3.6 made wrong code of 17 bfloat16 channels.
    """
    n = 8 if q.dtype.itemsize == 2 else 1
    return -(-q.shape[-1] // n) * n, -(-v.shape[-1] // n) * n


def padded(x: torch.Tensor | None, *sizes: int) -> torch.Tensor | None:
    """x with zeros behind its last dimensions, up to `sizes`."""
    if x is None:
        return None
    missing = [size - n for size, n in zip(sizes, x.shape[-len(sizes) :], strict=True)]
    return torch.nn.functional.pad(x, [n for m in reversed(missing) for n in (0, m)])


def alignment(*tensors: torch.Tensor) -> int:
    """The elements in 16 bytes if every outer stride of the tensors is a multiple of that, else 1."""
    n = 16 // tensors[0].element_size()
    return n if all(s % n == 0 for x in tensors for s in x.stride()[:-1]) else 1


def prepare(q, k, beta, g, cu_seqlens, *, scale, qk_l2norm, forward, BT, rows=None, steps=1) -> Chunks:
    """The backward also wants gamma, with a gate, the norms, with qk_l2norm, and for float16 the largest factors.

    `rows`: the live rows of a chunk of BT, all by default. `steps`: rows of k and beta for one of q and g; cu_seqlens
    counts the former. q and k have unit stride along their last dimension.
    """
    B, T, H, K = k.shape
    HV = beta.shape[2]
    rows = rows or BT
    # A chunk's offsets are 32 bits wide.
    beta, g = (x if x is None or x.stride(1) < 2**24 else x.contiguous() for x in (beta, g))
    slots = chunk_slots(B, T, cu_seqlens, rows)
    config = delta_rule_prepare_config(K, BT, q.dtype, arch())
    compute = torch.promote_types(q.dtype, torch.float32)
    M = torch.empty(slots, HV, BT, BT, dtype=q.dtype, device=q.device)
    BQ = query_rows(BT, steps)
    P = torch.empty(slots, HV, BT, BQ, dtype=q.dtype, device=q.device)
    factors = torch.empty(slots, HV, 4, BT, dtype=compute, device=q.device)
    decay = torch.empty(slots, HV, dtype=compute, device=q.device)
    scratch = torch.empty(slots, HV, 17, BT, dtype=compute, device=q.device)
    gamma = None if forward or g is None else torch.empty_like(M)
    norms = torch.empty_like(factors[:, :, :2]) if qk_l2norm and not forward else None
    largest = None if forward or q.dtype != torch.float16 else torch.empty_like(decay)
    if slots and T:
        with on_device(q):
            args = (
                q, k, beta, g, M, P, factors, decay, gamma, norms, largest, scratch, cu_seqlens, scale, T, 0 if
                cu_seqlens is None else cu_seqlens.shape[0] - 1, HV // H, *q.stride()[:3], *k.stride()[:3],
                *beta.stride(), *((0, 0, 0) if g is None else g.stride()),
            )  # fmt: skip
            constants = constexprs(
                K=K,
                STEPS=steps,
                ROWS=rows,
                BT=BT,
                BQ=BQ,
                BK=config.BK,
                ALIGN=alignment(q, k),
                QK_L2NORM=qk_l2norm,
                PRECISION=precision(q.dtype),
                INVERSE_PRECISION=inverse_precision(q.dtype),
                **config.options,
            )
            launch(prepare_kernel, (slots, HV), args, constants)
    return Chunks(M, P, factors, decay, gamma, norms, largest)


def inverse_precision(dtype: torch.dtype) -> str:
    """TF32 is good enough beside the rounding of 16-bit results; float32 gets float32."""
    return "tf32" if dtype.itemsize == 2 and arch().startswith("sm_") else "ieee"
