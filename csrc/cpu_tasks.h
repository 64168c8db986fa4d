// SPDX-License-Identifier: Apache-2.0
//
// How CPU kernels are run in parallel. For the torch side of an op only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>

namespace fla_ops {

// Runs task(i, scratch) for i in [0, tasks), each thread taking the next one and owning `scratch_bytes` of scratch.
template <class F>
void parallel_tasks(const torch::stable::Tensor& like, int64_t tasks, bool serial, int64_t scratch_bytes,
                    const F& task) {
  if (tasks == 0) return;
  const int64_t threads = serial ? 1 : std::min<int64_t>(tasks, torch::stable::get_num_threads());
  scratch_bytes = (scratch_bytes + 4095) / 4096 * 4096;
  torch::stable::Tensor scratch =
      torch::stable::new_empty(like, {threads * scratch_bytes}, torch::headeronly::ScalarType::Byte);
  char* base = static_cast<char*>(scratch.data_ptr());
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t begin, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      task(i, base + begin * scratch_bytes);
  };
  if (threads == 1) drain(0, 1);
  else torch::stable::parallel_for(0, threads, 1, drain);
}

}  // namespace fla_ops
