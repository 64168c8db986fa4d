# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of fla_ops, installed as `fla_ops.kernels`."""

if __name__ != "fla_ops.kernels":
    raise ImportError(
        f"this folder is fla_ops.kernels, not the package {__name__!r}: it was imported from a checkout of fla_ops "
        "because the working directory is on sys.path. Run from another folder to import Hugging Face's `kernels`, "
        "or install fla_ops (`pip install --no-build-isolation -e .`) and import `fla_ops.kernels`."
    )
