// SPDX-License-Identifier: Apache-2.0
#define FLA_OPS_LEVEL 0
#define FLA_OPS_LEVEL_NAME base
#include "decode_attention_cpu.inc"
