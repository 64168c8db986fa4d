// SPDX-License-Identifier: Apache-2.0
//
// The machine's float32 multiply-add rate: independent chains in registers, no memory. Built by conftest.py with
// -march=native; it ships in no wheel.
#include <chrono>

#include "widest_vector.h"

namespace {

constexpr int kChains = 12;  // more than latency times issue width on any x86 or Arm core of today

}  // namespace

// GFLOP/s of the calling thread over about `seconds`.
extern "C" double fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  Vector acc[kChains] = {};
  const Vector a = Vector{} + 0.999f, b = Vector{} + 0.5f;
  const long block = 100000;
  long done = 0;
  const auto start = Clock::now();
  double elapsed = 0;
  while (elapsed < seconds) {
    for (long i = 0; i < block; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) acc[c] = acc[c] * a + b;
      // The chains must stay in registers and must not be folded across iterations.
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) asm volatile("" : "+v"(acc[c]));
    }
    done += block;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return 2.0 * kLanes * kChains * double(done) / elapsed / 1e9;
}
