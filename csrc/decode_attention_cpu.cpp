// SPDX-License-Identifier: Apache-2.0
//
// Dense decode attention on the CPU, torch side: internal asserts (argument checks live in Python), tensors to plain
// views, the parallel loop, registration.
//
// A task takes kDecodePart keys of one key head and batch entry, for kDecodeRows rows of queries at most. The cut
// follows from the positions of the keys alone, and the parts are combined in order: neither the number of threads nor
// the rest of the batch changes a result's bits. The kernels are in decode_attention_cpu_rows.inc.
#include "decode_attention_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu_level.h"
#include "cpu_tasks.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds; below this a second thread costs more than it does

const DecodeAttentionKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512_extensions() ? avx512::decode_attention_bf16 : avx512::decode_attention;
  if (cpu_level() == kAvx2) return avx2::decode_attention;
#endif
  return base::decode_attention;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& lengths, double scale) {
  const auto dims = [](const Tensor& x) { return x.dim() == 4; };
  STD_TORCH_CHECK(dims(q) && dims(k) && dims(v), "decode_attention: q, k, v must have four dimensions");
  const int64_t B = q.size(0), Tq = q.size(1), HQ = q.size(2), D = q.size(3), T = k.size(1), HK = k.size(2);
  const int64_t DV = v.size(3);
  STD_TORCH_CHECK(k.size(0) == B && k.size(3) == D && v.size(0) == B && v.size(1) == T && v.size(2) == HK && HK >= 1 &&
                      HQ % HK == 0 && D >= 1 && DV >= 1 && k.scalar_type() == q.scalar_type() &&
                      v.scalar_type() == q.scalar_type() &&
                      (!lengths || (lengths->dim() == 1 && lengths->size(0) == B)),
                  "decode_attention: q must be [B, Tq, HQ, D], k [B, T, HK, D], v [B, T, HK, DV], lengths [B]");
  Tensor o = torch::stable::new_empty(q, {B, Tq, HQ, DV});
  DecodeAttention c{view(q, 3), view(o, 3), view(k, 3), view(v, 3), Tq, HQ / HK, int(D), int(DV), scale};
  const DecodeAttentionKernels& run = kernels();

  const int64_t rows = Tq * c.group, row_groups = ceil_div(rows, kDecodeRows), owners = B * HK * row_groups;
  std::vector<int64_t> length(B, T);
  if (lengths) for (int64_t b = 0; b < B; b++) length[b] = std::clamp<int64_t>(integer_at(*lengths, b), 0, T);
  const int64_t parts = ceil_div(T, kDecodePart), partial_bytes = run.partial_bytes(c);
  const auto rows_of = [&](int64_t owner) {
    const int64_t first = owner % row_groups * kDecodeRows, b = owner / row_groups / HK;
    return DecodeRows{b, owner / row_groups % HK, first, int(std::min<int64_t>(kDecodeRows, rows - first)), length[b]};
  };
  // Neighbouring tasks read the same keys' tokens: what the heads of a token share of a page is then still open.
  Tensor partial = torch::stable::new_empty(q, {owners * parts * partial_bytes}, ScalarType::Byte);
  char* sums = static_cast<char*>(partial.data_ptr());
  const bool serial = B * T * HQ * Tq * D < kSerialWork;
  const int64_t scratch = run.scratch(c);
  parallel_tasks(q, owners * parts, serial, scratch, [&](int64_t task, void* memory) {
    const int64_t owner = task % owners, begin = task / owners * kDecodePart;
    const DecodeRows r = rows_of(owner);
    const int64_t end = std::min(begin + kDecodePart, r.length);
    if (begin < end) run.part(c, r, begin, end, sums + (owner * parts + begin / kDecodePart) * partial_bytes, memory);
  });
  parallel_tasks(q, owners, serial || owners * parts < 256, scratch, [&](int64_t owner, void* memory) {
    const DecodeRows r = rows_of(owner);
    run.combine(c, r, sums + owner * parts * partial_bytes, partial_bytes, ceil_div(r.length, kDecodePart), memory);
  });
  return o;
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) { m.impl("decode_attention", TORCH_BOX(&fla_ops::decode_attention)); }
