# SPDX-License-Identifier: Apache-2.0
"""Dense attention of the newest tokens over a cache of keys and values (arXiv 1706.03762, equation 1) on GPUs.

    o_i = softmax_j(scale q_i . k_j) v_j    over the keys j up to token i's own

Flash decoding: the keys are split over programs, as many as fill the GPU, by the shapes alone; lengths are read on the
device, so that a captured graph can be replayed while rows grow. Scores, the softmax and sums are float32 (float64 for
float64); weights are rounded to the values' dtype for their product.
"""

import torch
import triton
import triton.language as tl

from ._config import decode_attention_config
from ._decode import channels_of, combine, load_queries, new_parts, rows_of_queries, scores, split_keys, store_outputs
from ._launch import arch, cdiv, constexprs, launch, on_device, precision
from ._launch import why_not as _why_not_here
from ._operators import operator
from ._scan import first_of_segment
from ._sparse import LOG2_E, block_of, load_rows, rows_of
from ._tiles import cast, dot, softmax_step

MAX_HEAD_DIM = 256
UNKNOWN = 512  # keys of a split, at most, where rows may be much shorter than the cache that holds them

# ------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["Tq", "T", "S", "SPAN"])
def split_kernel(
    q,  # [B, Tq, HQ, D]
    k,  # [B, T, HK, D]
    v,  # [B, T, HK, DV]
    lengths,  # [B] or None
    o,  # [B, Tq, HQ, DV], contiguous; written where keys are not split
    parts, norms,  # as `store_outputs` has them, or None
    Tq, T, HQ, HK, S, SPAN, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    FACTOR: tl.constexpr,  # scale log2(e)
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    GROUP = HQ // HK
    blocks = tl.cdiv(Tq * GROUP, BM)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % S
    key_head = (tl.program_id(0) // (blocks * S) % HK).to(tl.int64)
    batch = (tl.program_id(0) // (blocks * S * HK)).to(tl.int64)
    if lengths is None:
        length = tl.cast(T, tl.int32)
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int64), 0), T).to(tl.int32)
    q += batch * q_b
    k += batch * k_b + key_head * k_h
    v += batch * v_b + key_head * v_h

    token, head, live = rows_of_queries(block, key_head, Tq, GROUP, BM)
    limit = tl.where(live, length - Tq + token + 1, 0)  # a row sees the keys before it
    newest = tl.minimum(block * BM + BM, Tq * GROUP) - 1
    begin = first_of_segment(split, SPAN)
    last = tl.minimum(begin + SPAN, length - Tq + newest // GROUP + 1)
    queries = load_queries(q, token, head, live, q_t, q_h, D, BD, BC)
    m = tl.full([BM], float("-inf"), dtype)
    l = tl.zeros([BM], dtype)
    acc = tl.zeros([BM, BV], dtype)
    for key in range(begin, last, BN):
        s = scores(queries, k, k_t, key, last, D, BD, BC, BN, PRECISION)
        j = key + tl.arange(0, BN)
        s = tl.where(j[None, :] < limit[:, None], s * FACTOR, float("-inf"))
        m, l, p, alpha = softmax_step(m, l, s)
        values = load_rows(v, v_t, key, last, DV, BV, BN)
        acc = dot(cast(p, v.dtype.element_ty), values, acc * alpha[:, None], PRECISION)
    store_outputs(o, parts, norms, m, l, acc, limit > begin, batch, token, head, live, split, Tq, HQ, S, DV, BV, SPLIT)


# ----------------------------------------------------------------------------------------------- launchers


def why_not(device: str, dtype: torch.dtype, *sizes: int) -> str | None:
    """The reason why this backend cannot run head dimensions `sizes`, or None."""
    missing = _why_not_here(device)
    if missing is None and any(s > MAX_HEAD_DIM for s in sizes):
        return f"head dimensions go up to {MAX_HEAD_DIM}, got {max(sizes)}"
    return missing


def _result(q, k, v, *, lengths, scale):
    """What `forward` returns, not written."""
    return torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)


@operator(
    "decode_attention_forward(Tensor q, Tensor k, Tensor v, *, Tensor? lengths, float scale) -> Tensor",
    _result,
)
def forward(q, k, v, *, lengths, scale):
    """o; q is `[B, Tq, HQ, D]`."""
    o = _result(q, k, v, lengths=lengths, scale=scale)
    if o.numel() == 0:
        return o
    q, k, v = rows_of(q, k, v)
    B, Tq, HQ, D = q.shape
    T, HK, DV = v.shape[1:]
    rows = Tq * (HQ // HK)
    BD, BV = block_of(D), block_of(DV)
    with on_device(q):
        config = decode_attention_config(rows, max(BD, BV), q.dtype, arch())
        programs = B * HK * cdiv(rows, config.BT)
        span, splits = split_keys(programs, T, config.BK, q, *(() if lengths is None else (UNKNOWN,)))
        parts, norms = new_parts(q, DV, splits)
        constants = constexprs(
            FACTOR=scale * LOG2_E, D=D, DV=DV, BD=BD, BV=BV, BC=channels_of(BD, q.dtype), BM=config.BT, BN=config.BK,
            SPLIT=splits > 1, PRECISION=precision(q.dtype), **config.options,
        )  # fmt: skip
        args = (
            q, k, v, lengths, o, parts, norms, Tq, T, HQ, HK, splits, span,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        )  # fmt: skip
        launch(split_kernel, (programs * splits,), args, constants)
        combine(parts, norms, o, DV, BV)
    return o
