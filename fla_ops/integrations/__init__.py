# SPDX-License-Identifier: Apache-2.0
"""fla_ops under models of other packages, in place: one module a package, each imported by name.

from fla_ops.integrations.transformers import accelerate
"""
