// SPDX-License-Identifier: Apache-2.0
#define FLA_OPS_LEVEL 0
#define FLA_OPS_LEVEL_NAME base
#include "causal_conv1d_cpu.inc"
