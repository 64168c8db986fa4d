// SPDX-License-Identifier: Apache-2.0
//
// CUDA's device language for the host compiler, so that the kernels of the .cu files run in tests on machines without
// a GPU. Included by launch.h where nvcc is not the compiler; simt_shim.cpp holds the scheduler.
//
// The threads of a block are fibers of one host thread, blocks run one after another. A thread runs until it waits: at
// __syncthreads for its block, at a *_sync intrinsic for its warp. What a GPU would let pass, or leave undefined,
// stops the process with a message that names the kernel, the block and who waits where:
//   - a barrier, or a warp intrinsic, that some threads reach and others leave out;
//   - a warp intrinsic whose mask leaves out a live lane, a shuffle that reads a lane which has exited;
//   - a write behind the end of dynamic shared memory, more of it than every GPU has, a grid no GPU takes.
// Shared memory is NaN (integers: -1) at the start of each block. Lanes and blocks run in ascending or, by a switch, in
// descending order: a missing __syncthreads gives a wrong result in one of the two.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fla_ops::simt {

using Where = std::source_location;

// Runs run(call) once for every thread of the grid.
void run_grid(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void (*run)(const void*),
              const void* call);
void set_reversed(bool reversed);

// What a running kernel asks for.
void wait_for_block(const Where& where);
struct FromWarp {
  uint64_t value;   // what the lane asked for gave
  unsigned ballot;  // the lanes that gave something other than 0
};
FromWarp exchange(const char* intrinsic, unsigned mask, uint64_t value, int source, const Where& where);
int lane();
uint64_t block_number();  // differs from block to block, over all launches
void* dynamic_shared();

// Static shared memory: one copy serves all blocks, which run one after another.
template <class T, size_t n> struct Shared {
  alignas(16) T data[n];
  uint64_t owner = 0;

  auto& of_this_block() {
    static_assert(sizeof(data) <= 48 * 1024, "static shared memory is limited to 48 KB");
    if (owner != block_number()) {
      std::memset(static_cast<void*>(data), 0xff, sizeof(data));
      owner = block_number();
    }
    return data;
  }
};

template <class... Params>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_bytes,
            const std::type_identity_t<Params>&... args) {
  const auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  run_grid(name, grid, block, dynamic_bytes, [](const void* f) { (*static_cast<Call*>(f))(); }, &call);
}

template <class T> uint64_t to_bits(T x) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T> T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// `source` of lane i, given the first and last lane of its group of `width`; outside of the group: itself.
template <class T, class F> T shuffle(const char* name, unsigned mask, T x, int width, const Where& where, F source) {
  const int first = lane() & ~(width - 1), last = lane() | (width - 1);
  const int from = source(lane(), first);
  const bool inside = from >= first && from <= last;
  return from_bits<T>(exchange(name, mask, to_bits(x), inside ? from : lane(), where).value);
}

}  // namespace fla_ops::simt

inline void __syncthreads(const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  fla_ops::simt::wait_for_block(where);
}
inline void __syncwarp(unsigned mask = 0xffffffff,
                       const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  fla_ops::simt::exchange("__syncwarp", mask, 0, fla_ops::simt::lane(), where);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = warpSize,
              const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::shuffle("__shfl_sync", mask, x, width, where,
                                [=](int, int first) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = warpSize,
                 const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::shuffle("__shfl_up_sync", mask, x, width, where,
                                [=](int lane, int) { return lane - int(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = warpSize,
                   const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::shuffle("__shfl_down_sync", mask, x, width, where,
                                [=](int lane, int) { return lane + int(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = warpSize,
                  const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::shuffle("__shfl_xor_sync", mask, x, width, where, [=](int lane, int) { return lane ^ lanes; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::exchange("__ballot_sync", mask, predicate != 0, fla_ops::simt::lane(), where).ballot;
}
inline int __any_sync(unsigned mask, int predicate,
                      const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::exchange("__any_sync", mask, predicate != 0, fla_ops::simt::lane(), where).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      const fla_ops::simt::Where& where = fla_ops::simt::Where::current()) {
  return fla_ops::simt::exchange("__all_sync", mask, predicate == 0, fla_ops::simt::lane(), where).ballot == 0;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T* p) { return *p; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
using std::max;
using std::min;
