// SPDX-License-Identifier: Apache-2.0
//
// Which build of the CPU kernels runs: chosen once by cpuid, changed only by tests.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#define FLA_OPS_X86 1
#else
#define FLA_OPS_X86 0
#endif

namespace fla_ops {

enum CpuLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level this machine and its operating system support.
int best_cpu_level();
// The level in use.
int cpu_level();
// Returns false, changing nothing, if the machine lacks the level.
bool set_cpu_level(int level);

// Whether the kernels of kAvx512 may use AVX512_BF16 and AVX512_VBMI2, which came later than the rest.
bool avx512_extensions();
// Returns false, changing nothing, if they are to be used and this machine lacks one.
bool set_avx512_extensions(bool used);

}  // namespace fla_ops
