// SPDX-License-Identifier: Apache-2.0
//
// What a .cu file needs beyond the device language itself: launches and shared memory, spelled so that the same file
// compiles with nvcc for GPUs, and with a C++ compiler for tests without one (-DFLA_SIMT: see simt_shim.h).
//
//   FLA_LAUNCH((kernel<float, 4>), grid, block, dynamic_bytes, stream, arguments...);   // an empty grid is no launch
//   FLA_SHARED(float, tile, 32 * 33);   // float tile[32 * 33] in shared memory
//   FLA_DYN_SHARED(float, rows);        // float* rows: the launch's dynamic shared memory
//   FLA_UNROLL for (...)                // a loop over a thread's registers, of a constant length
//
// Kernels use no inline PTX, wmma, cooperative groups, atomics, nor the lockstep of a warp; warp intrinsics are the
// *_sync ones, with every live lane in the mask.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#if defined(__CUDACC__)
#define FLA_UNROLL _Pragma("unroll")
#else
#define FLA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fla_ops {

constexpr unsigned kWarp = 0xffffffff;  // the mask of all lanes

}  // namespace fla_ops

#if defined(FLA_SIMT)

#include "simt_shim.h"

#define FLA_SHARED(T, name, n)                              \
  static ::fla_ops::simt::Shared<T, (n)> name##_of_a_block; \
  T(&name)[n] = name##_of_a_block.of_this_block()
#define FLA_DYN_SHARED(T, name) T* const name = static_cast<T*>(::fla_ops::simt::dynamic_shared())

namespace fla_ops {

struct Stream {};

template <class... Params>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_bytes, Stream,
            const std::type_identity_t<Params>&... args) {
  if (grid.x && grid.y && grid.z) simt::launch(name, kernel, grid, block, dynamic_bytes, args...);
}

}  // namespace fla_ops

#else

#include <cuda_runtime.h>

#define FLA_SHARED(T, name, n) __shared__ T name[n]
#define FLA_DYN_SHARED(T, name)                                      \
  extern __shared__ __align__(16) unsigned char fla_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(fla_dynamic_shared)

namespace fla_ops {

using Stream = cudaStream_t;

template <class... Params>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_bytes, Stream stream,
            const std::type_identity_t<Params>&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaError_t error = cudaSuccess;
  if (dynamic_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, block, dynamic_bytes, stream>>>(args...);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, "fla_ops: ", name, " did not launch: ", cudaGetErrorString(error));
}

}  // namespace fla_ops

#endif

#define FLA_LAUNCH(kernel, ...) ::fla_ops::launch(#kernel, kernel, __VA_ARGS__)
