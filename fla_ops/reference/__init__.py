# SPDX-License-Identifier: Apache-2.0
"""The references that define every op: slow step loops in plain differentiable torch, used by no fast path."""
