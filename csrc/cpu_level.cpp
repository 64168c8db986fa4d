// SPDX-License-Identifier: Apache-2.0
#include "cpu_level.h"

#include <atomic>
#include <cstdint>

#if FLA_OPS_X86
#include <cpuid.h>
#endif

namespace fla_ops {
namespace {

int detect() {
#if FLA_OPS_X86
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return kPortable;
  const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  const uint32_t first = fma | osxsave | avx | f16c;
  if ((c & first) != first) return kPortable;
  // The registers that the operating system saves: xmm, ymm; opmask and both halves of zmm.
  uint32_t saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kPortable;
  if (!(b & (1u << 5))) return kPortable;
  const uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  const uint32_t wide = f | dq | bw | vl;
  return (b & wide) == wide && (saved & 0xe6) == 0xe6 ? kAvx512 : kAvx2;
#else
  return kPortable;
#endif
}

bool detect_extensions() {
#if FLA_OPS_X86
  uint32_t a, b, c, d, most;
  if (best_cpu_level() < kAvx512 || !__get_cpuid_count(7, 0, &most, &b, &c, &d) || most < 1) return false;
  const bool vbmi2 = c & (1u << 6);
  return vbmi2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
  return false;
#endif
}

bool has_extensions() {
  static const bool found = detect_extensions();
  return found;
}

std::atomic<int> current{-1};
std::atomic<bool> extensions{true};

}  // namespace

int best_cpu_level() {
  static const int level = detect();
  return level;
}

int cpu_level() {
  const int level = current.load(std::memory_order_relaxed);
  return level < 0 ? best_cpu_level() : level;
}

bool set_cpu_level(int level) {
  if (level < kPortable || level > best_cpu_level()) return false;
  current.store(level, std::memory_order_relaxed);
  return true;
}

bool avx512_extensions() { return extensions.load(std::memory_order_relaxed) && has_extensions(); }

bool set_avx512_extensions(bool used) {
  if (used && !has_extensions()) return false;
  extensions.store(used, std::memory_order_relaxed);
  return true;
}

}  // namespace fla_ops
