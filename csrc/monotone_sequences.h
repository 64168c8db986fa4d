// SPDX-License-Identifier: Apache-2.0
//
// Packed sequences that neither overlap nor leave their row, whatever cu_seqlens holds: for kernels that give each
// sequence memory of its own by where it starts.
#pragma once

#include <optional>
#include <utility>

#include "cuda_op.h"
#include "device_view.h"

namespace fla_ops {
namespace {

// bounds[i] = the largest of 0 and cu_seqlens[0..i], at most `length`. One warp.
__global__ void monotone_bounds(Integers cu_seqlens, int64_t count, int64_t length, int64_t* bounds) {
  int64_t largest = 0;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t i = first + threadIdx.x;
    int64_t bound = i < count ? max(largest, min(cu_seqlens[i], length)) : largest;
    for (int away = 1; away < 32; away *= 2) bound = max(bound, __shfl_up_sync(kWarp, bound, away));
    if (i < count) bounds[i] = bound;
    largest = __shfl_sync(kWarp, bound, 31);
  }
}

// The sequences of a call on x's device, and the memory that their bounds are in.
std::pair<Sequences, std::optional<torch::stable::Tensor>> monotone_sequences(
    const torch::stable::Tensor& x, int64_t batch, int64_t length,
    const std::optional<torch::stable::Tensor>& cu_seqlens, Stream stream) {
  Sequences sequences = sequences_on_device(batch, length, cu_seqlens);
  if (!cu_seqlens) return {sequences, std::nullopt};
  const int64_t count = cu_seqlens->size(0);
  torch::stable::Tensor bounds = torch::stable::new_empty(x, {count}, torch::headeronly::ScalarType::Long);
  int64_t* const data = static_cast<int64_t*>(bounds.data_ptr());
  FLA_LAUNCH(monotone_bounds, 1, 32, 0, stream, sequences.cu_seqlens, count, sequences.length, data);
  sequences.cu_seqlens = integers(bounds);
  return {sequences, bounds};
}

}  // namespace
}  // namespace fla_ops
