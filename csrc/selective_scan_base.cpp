// SPDX-License-Identifier: Apache-2.0
#define FLA_OPS_LEVEL 0
#define FLA_OPS_LEVEL_NAME base
#include "selective_scan_cpu.inc"
