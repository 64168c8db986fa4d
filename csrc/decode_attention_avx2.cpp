// SPDX-License-Identifier: Apache-2.0
#include "cpu_level.h"
#if FLA_OPS_X86
#define FLA_OPS_LEVEL 1
#define FLA_OPS_LEVEL_NAME avx2
#include "decode_attention_cpu.inc"
#endif
