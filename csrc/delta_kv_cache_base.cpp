// SPDX-License-Identifier: Apache-2.0
#define FLA_OPS_LEVEL 0
#define FLA_OPS_LEVEL_NAME base
#include "delta_kv_cache_cpu.inc"
