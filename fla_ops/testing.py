# SPDX-License-Identifier: Apache-2.0
"""How correctness is defined: a kernel against the float64 reference, within a budget set by the reference itself.

`ref64` is the reference in float64 on inputs first rounded to the tested dtype. `ref_low` is the same loop with every
product's operands rounded to the tested dtype while state and sums stay float32. A kernel may be `c` times as far from
`ref64` as `ref_low` is, plus one rounding.
"""

import torch

C_OUTPUT = 2.0
C_GRADIENT = 3.0


def assert_matches_reference(
    actual: torch.Tensor,
    ref64: torch.Tensor,
    ref_low: torch.Tensor,
    name: str,
    *,
    gradient: bool = False,
    seed: int | None = None,
) -> None:
    """Raise AssertionError unless `actual` is as close to `ref64` as its dtype allows.

    Args:
        actual: the kernel's result, in the dtype under test.
        ref64: the float64 reference's result, same shape.
        ref_low: the low-precision reference's result, same shape and dtype as `actual`.
        name: what is compared, for the message.
        gradient: gradients get a budget of 3 instead of 2 low-precision errors.
        seed: printed on failure.

    The rules: 1. shapes, dtypes and the positions of NaN and infinities agree. 2. With e = actual - ref64 and
    l = ref_low - ref64: max|e| <= c (max|l| + eps max|ref64|) and rms(e) <= c rms(l) + eps/4 rms(ref64), eps of the
    tested dtype. For float64: max|e| <= 1e-12 max|ref64|.
    """
    assert actual.shape == ref64.shape == ref_low.shape, (
        f"{name}: shapes {list(actual.shape)}, {list(ref64.shape)}, {list(ref_low.shape)} differ"
    )
    assert ref64.dtype == torch.float64, f"{name}: ref64 must be float64, is {ref64.dtype}"
    assert actual.dtype == ref_low.dtype, f"{name}: dtype {actual.dtype}, expected {ref_low.dtype} (the reference's)"
    a, r, low = (x.detach().to("cpu", torch.float64) for x in (actual, ref64, ref_low))
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(a) != test(r)
        assert not wrong.any(), (
            f"{name}: {what} at other places than in the reference, first at {wrong.nonzero()[0].tolist()}{_seed(seed)}"
        )
    finite = torch.isfinite(r)
    if not finite.any():
        return
    e = torch.where(finite, a - r, 0)
    l = torch.where(finite & torch.isfinite(low), low - r, 0)
    size = torch.where(finite, r, 0)
    worst, peak = e.abs().max().item(), size.abs().max().item()
    if actual.dtype == torch.float64:
        budget, rms, rms_budget = 1e-12 * peak, 0.0, 0.0
    else:
        c, eps = (C_GRADIENT if gradient else C_OUTPUT), torch.finfo(actual.dtype).eps
        budget = c * (l.abs().max().item() + eps * peak)
        rms, rms_budget = _rms(e), c * _rms(l) + eps / 4 * _rms(size)
    if worst <= budget and rms <= rms_budget:
        return
    at = [int(i) for i in torch.unravel_index(e.abs().argmax(), e.shape)]
    raise AssertionError(
        f"{name} ({actual.dtype}): max error {worst:.3e}, allowed {budget:.3e}; rms error {rms:.3e}, allowed "
        f"{rms_budget:.3e}; worst at {at}: got {a[tuple(at)].item():.9g}, reference {r[tuple(at)].item():.9g}"
        f"{_seed(seed)}"
    )


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _seed(seed: int | None) -> str:
    return "" if seed is None else f"; seed {seed}"
