# SPDX-License-Identifier: Apache-2.0
"""The names, argument orders and layouts of other packages on this package's ops: change the import line, no more.

`fla_ops.compat.fla` stands for flash-linear-attention (fla-core 0.6), `fla_ops.compat.causal_conv1d` for causal-conv1d
1.7, `fla_ops.compat.mamba_ssm` for mamba-ssm 2.3. They are thin adapters that run wherever the ops run, on CPU too. An
option that is not supported raises, as does an unknown keyword; nothing is swallowed.
"""
