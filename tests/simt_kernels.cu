// SPDX-License-Identifier: Apache-2.0
//
// Small kernels, right and wrong ones, for test_simt.py: a program that runs the kernel it is told to in the lane order
// it is told to, and prints what the kernel wrote.
//
//   simt_kernels <kernel> ascending|descending
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "launch.h"

namespace {

// y = x backwards, through shared memory; out of order without the barrier.
template <bool kBarrier> __global__ void reverse(const float* x, float* y) {
  FLA_SHARED(float, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  if (kBarrier) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

// Sums by halves. Every round reads what the round before wrote: without its barrier, lanes meet old values.
template <bool kBarrier> __global__ void block_sum(const float* x, float* y) {
  FLA_DYN_SHARED(float, sums);
  const int i = threadIdx.x, n = blockDim.x;
  sums[i] = x[i];
  __syncthreads();
  for (int half = n / 2; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
    if (kBarrier) __syncthreads();
  }
  y[i] = sums[0];
}

// One buffer, read and then written again: the barrier between the two is missing.
template <bool kBarrier> __global__ void rotate_twice(const float* x, float* y) {
  FLA_SHARED(float, tile, 64);
  const int i = threadIdx.x;
  float value = x[i];
  for (int round = 0; round < 2; round++) {
    if (kBarrier) __syncthreads();
    tile[i] = value;
    __syncthreads();
    value = tile[(i + 1) % 64];
  }
  y[i] = value;
}

// What shared memory holds before anyone wrote to it, in both blocks: the first one leaves numbers behind.
__global__ void unwritten(const float*, float* y) {
  FLA_SHARED(float, fixed, 16);
  FLA_DYN_SHARED(double, dynamic);
  y[blockIdx.x * 32 + threadIdx.x] = fixed[threadIdx.x];
  y[blockIdx.x * 32 + 16 + threadIdx.x] = float(dynamic[threadIdx.x]);
  fixed[threadIdx.x] = 1;
  dynamic[threadIdx.x] = 1;
}

// Every intrinsic on lane numbers, in a block of two warps: rows of 64.
__global__ void intrinsics(const float*, float* y) {
  const unsigned all = 0xffffffff;
  const int i = threadIdx.x;
  float* row = y + i;
  const auto put = [&](double value) {
    *row = float(value);
    row += 64;
  };
  put(__shfl_sync(all, i, 5));
  put(__shfl_sync(all, double(i), 9, 8));
  put(__shfl_sync(all, i, i + 1));
  put(__shfl_up_sync(all, float(i), 3));
  put(__shfl_up_sync(all, i, 3, 8));
  put(__shfl_down_sync(all, int64_t(i), 2));
  put(__shfl_down_sync(all, i, 2, 16));
  put(__shfl_xor_sync(all, i, 16));
  put(__shfl_xor_sync(all, i, 1, 2));
  __syncwarp();
  put(__ballot_sync(all, i % 32 < 3));
  put(__any_sync(all, i == 40));
  put(__all_sync(all, i < 32));
}

// threadIdx, blockIdx, and a warp intrinsic, in three dimensions: each thread writes its number once.
__global__ void three_dimensions(const float*, float* y) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int first = __shfl_sync(0xffffffff, thread, 0);
  y[block * 64 + thread] = float(block * 1000 + thread + (first == thread / 32 * 32 ? 0 : 1e6));
}

// The wrong ones: none may come back.

__global__ void barrier_after_exit(const float*, float* y) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void two_barriers(const float*, float*) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
__global__ void barrier_and_shuffle(const float*, float* y) {
  if (threadIdx.x % 2) __syncthreads();
  else y[threadIdx.x] = __shfl_sync(0xffffffff, 1.0f, 0);
}
__global__ void two_shuffles(const float*, float* y) {
  float value = 1;
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0x0000ffff, value, 0);
  else value = __shfl_sync(0xffff0000, value, 16);
  y[threadIdx.x] = value;
}
__global__ void narrow_mask(const float*, float* y) { y[threadIdx.x] = __shfl_xor_sync(0x0000ffff, 1.0f, 1); }
__global__ void exited_lane(const float*, float* y) {
  if (threadIdx.x == 33) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
}
__global__ void behind_shared_memory(const float*, float*) {
  FLA_DYN_SHARED(float, rows);
  rows[64 + threadIdx.x / 63] = 1;
}
__global__ void nothing(const float*, float*) {}

__global__ void many_barriers(const float*, float* y) {
  for (int i = 0; i < 20000; i++) __syncthreads();
  y[threadIdx.x] = 0;
}

void (*const kAnyKernel)(const float*, float*) = nothing;

void run(const char* name, decltype(kAnyKernel) kernel, int size, dim3 grid, dim3 block, size_t dynamic_bytes = 0) {
  std::vector<float> x(64), y(size, -1.0f);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i);
  fla_ops::launch(name, kernel, grid, block, dynamic_bytes, {}, x.data(), y.data());
  for (float value : y) printf("%.9g ", value);
  printf("\n");
}

// Nanoseconds a switch: into a thread, or back.
void switches(const char* name) {
  const std::clock_t start = std::clock();
  float y[256];
  fla_ops::launch(name, many_barriers, 1, 256, 0, {}, nullptr, y);
  printf("%.3g\n", 1e9 * double(std::clock() - start) / CLOCKS_PER_SEC / (2.0 * 256 * 20000));
}

}  // namespace

#define KERNEL(name, ...) \
  { #name, [] { run(#name, name, __VA_ARGS__); } }

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> kernels = {
      KERNEL(reverse<true>, 64, 1, 64),
      KERNEL(reverse<false>, 64, 1, 64),
      KERNEL(block_sum<true>, 64, 1, 64, 256),
      KERNEL(block_sum<false>, 64, 1, 64, 256),
      KERNEL(rotate_twice<true>, 64, 1, 64),
      KERNEL(rotate_twice<false>, 64, 1, 64),
      KERNEL(unwritten, 64, 2, 16, 128),
      KERNEL(intrinsics, 12 * 64, 1, 64),
      KERNEL(three_dimensions, 8 * 64, dim3(2, 2, 2), dim3(4, 4, 4)),
      KERNEL(barrier_after_exit, 64, 1, 64),
      KERNEL(two_barriers, 64, 1, 64),
      KERNEL(barrier_and_shuffle, 64, 1, 64),
      KERNEL(two_shuffles, 64, 1, 64),
      KERNEL(narrow_mask, 64, 1, 64),
      KERNEL(exited_lane, 64, 1, 64),
      KERNEL(behind_shared_memory, 64, 1, 64, 256),
      {"too_much_shared_memory", [] { run("too_much_shared_memory", nothing, 1, 1, 32, 100 * 1024); }},
      {"too_many_threads", [] { run("too_many_threads", nothing, 1, 1, 1025); }},
      {"too_large_a_grid", [] { run("too_large_a_grid", nothing, 1, dim3(1, 65536), 32); }},
      {"empty_grid", [] { run("empty_grid", nothing, 1, dim3(0, 65536), 32); }},
      {"switches", [] { switches("switches"); }},
  };
  if (argc != 3 || !kernels.count(argv[1])) return 2;
  fla_ops::simt::set_reversed(!strcmp(argv[2], "descending"));
  kernels.at(argv[1])();
}
