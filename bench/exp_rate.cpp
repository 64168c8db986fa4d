// SPDX-License-Identifier: Apache-2.0
//
// The machine's rate of float32 exponentials of the selective scan's kind, and of nothing else: 2^x for x <= 0, from
// one array in the first-level cache to another. Built by conftest.py with -march=native; it ships in no wheel.
#include <chrono>

#include "widest_vector.h"

namespace {

typedef int Bits __attribute__((vector_size(kBytes)));
constexpr int kVectors = 4096 / kBytes;

// x = n + f with |f| <= 1/2: a polynomial of degree 5 in f, 2e-7 off, and n added to its exponent.
inline Vector exp2(Vector x) {
  const Vector lowest = Vector{} - 126.0f;  // the scan's decays below 2^-126 are as good as zero
  x = x < lowest ? lowest : x;
  const Vector shifted = x + 0x1.8p23f;
  const Vector f = x - (shifted - 0x1.8p23f);
  Vector p = f * 0x1.5c08e2p-10f + 0x1.3d0c52p-7f;
  p = p * f + 0x1.c6b6e6p-5f;
  p = p * f + 0x1.ebf918p-3f;
  p = p * f + 0x1.62e428p-1f;
  p = p * f + 0x1.000002p+0f;
  return (Vector)((Bits)p + ((Bits)shifted << 23));
}

}  // namespace

// Gexp/s of the calling thread over about `seconds`.
extern "C" double exp_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  static thread_local Vector in[kVectors], out[kVectors];
  for (int i = 0; i < kVectors; ++i)
    for (int j = 0; j < kLanes; ++j) in[i][j] = -0.01f * float(kLanes * i + j);
  const long block = 2000;
  long done = 0;
  const auto start = Clock::now();
  double elapsed = 0;
  while (elapsed < seconds) {
    for (long i = 0; i < block; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) out[j] = exp2(in[j]);
      asm volatile("" : : "r"(in), "r"(out) : "memory");  // every pass reads and writes the arrays again
    }
    done += block;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return double(kLanes) * kVectors * double(done) / elapsed / 1e9;
}
