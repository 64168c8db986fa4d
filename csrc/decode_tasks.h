// SPDX-License-Identifier: Apache-2.0
//
// How attention over a cache is cut into tasks. For the torch side of an op only.
//
// A task takes kDecodePart keys of one key head and batch entry, for kDecodeRows rows of queries at most. The cut
// follows from the positions of the keys alone, and the parts are combined in order: neither the number of threads nor
// the rest of the batch changes a result's bits.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_tasks.h"
#include "decode_attention_cpu.h"

namespace fla_ops {

constexpr int64_t kSerialDecode = 1 << 17;  // multiply-adds; below this a second thread costs more than it does

struct DecodeTasks {
  int64_t HK, rows;                    // rows: of queries that share a key head
  const std::vector<int64_t>& length;  // the keys of each batch entry
  int64_t partial_bytes, scratch_bytes;
  bool serial;
};

// part(DecodeRows, begin, end, partial, scratch) for all keys and rows; then combine(DecodeRows, partials, count,
// scratch) for all rows.
template <class Part, class Combine>
void run_decode(const torch::stable::Tensor& like, const DecodeTasks& t, const Part& part, const Combine& combine) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t longest = 0;
  for (int64_t n : t.length) longest = std::max(longest, n);
  const int64_t row_groups = ceil_div(t.rows, kDecodeRows), owners = int64_t(t.length.size()) * t.HK * row_groups;
  const int64_t parts = ceil_div(longest, kDecodePart);
  const auto rows_of = [&](int64_t owner) {
    const int64_t first = owner % row_groups * kDecodeRows, b = owner / row_groups / t.HK;
    return DecodeRows{b, owner / row_groups % t.HK, first, int(std::min<int64_t>(kDecodeRows, t.rows - first)),
                      t.length[b]};
  };
  torch::stable::Tensor partial = torch::stable::new_empty(like, {owners * parts * t.partial_bytes},
                                                           torch::headeronly::ScalarType::Byte);
  char* sums = static_cast<char*>(partial.data_ptr());
  // Neighbouring tasks read the same keys' tokens: what the heads of a token share of a page is then still open.
  parallel_tasks(like, owners * parts, t.serial, t.scratch_bytes, [&](int64_t task, void* memory) {
    const int64_t owner = task % owners, index = task / owners, begin = index * kDecodePart;
    const DecodeRows r = rows_of(owner);
    const int64_t end = std::min(begin + kDecodePart, r.length);
    if (begin < end) part(r, begin, end, sums + (owner * parts + index) * t.partial_bytes, memory);
  });
  const bool few = owners * parts < 256;
  parallel_tasks(like, owners, t.serial || few, t.scratch_bytes, [&](int64_t owner, void* memory) {
    const DecodeRows r = rows_of(owner);
    combine(r, sums + owner * parts * t.partial_bytes, ceil_div(r.length, kDecodePart), memory);
  });
}

}  // namespace fla_ops
