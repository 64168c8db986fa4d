// SPDX-License-Identifier: Apache-2.0
//
// Dense decode attention on the CPU, torch side: internal asserts (argument checks live in Python), tensors to plain
// views, registration. The parallel loop is in decode_tasks.h, the kernels are in decode_attention_cpu_rows.inc.
#include "decode_attention_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu_level.h"
#include "decode_tasks.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

const DecodeAttentionKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512_extensions() ? avx512::decode_attention_bf16 : avx512::decode_attention;
  if (cpu_level() == kAvx2) return avx2::decode_attention;
#endif
  return base::decode_attention;
}

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

  std::vector<int64_t> length(B, T);
  if (lengths) for (int64_t b = 0; b < B; b++) length[b] = std::clamp<int64_t>(integer_at(*lengths, b), 0, T);
  const int64_t partial_bytes = run.partial_bytes(c);
  run_decode(q, {HK, Tq * c.group, length, partial_bytes, run.scratch(c), B * T * HQ * Tq * D < kSerialDecode},
             [&](const DecodeRows& rows, int64_t begin, int64_t end, char* partial, void* scratch) {
               run.part(c, rows, begin, end, partial, scratch);
             },
             [&](const DecodeRows& rows, const char* partials, int64_t count, void* scratch) {
               run.combine(c, rows, partials, partial_bytes, count, scratch);
             });
  return o;
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) { m.impl("decode_attention", TORCH_BOX(&fla_ops::decode_attention)); }
