# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of fla_ops, installed as `fla_ops.kernels`."""

if __name__ != "fla_ops.kernels":
    raise ImportError(
        f"{__name__!r} was found in a checkout of fla_ops, because the working directory is on sys.path: this folder "
        "is fla_ops.kernels, not Hugging Face's `kernels`. Use `python -P` (or PYTHONSAFEPATH=1), or another folder."
    )
