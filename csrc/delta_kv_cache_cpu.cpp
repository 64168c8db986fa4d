// SPDX-License-Identifier: Apache-2.0
//
// DeltaLLM's cache on the CPU, torch side: internal asserts (argument checks live in Python), tensors to plain views,
// the parallel loops, registration.
//
// Sealing and holding go through a key head's tokens in order, one key head a task; attention is cut as decode_tasks.h
// says. The kernels are in delta_kv_cache_cpu_records.inc and delta_kv_cache_cpu.inc.
#include "delta_kv_cache_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu_level.h"
#include "decode_tasks.h"
#include "huge_pages.h"
#include "torch_view.h"

namespace fla_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSerialKeys = 1 << 14;  // channels of keys; below this a second thread costs more than it does

const DeltaCacheKernels& kernels() {
#if FLA_OPS_X86
  if (cpu_level() == kAvx512) return avx512_extensions() ? avx512::delta_kv_cache_vbmi2 : avx512::delta_kv_cache;
  if (cpu_level() == kAvx2) return avx2::delta_kv_cache;
#endif
  return base::delta_kv_cache;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

char* bytes_of(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }

// The parts of a cache that every op has.
DeltaCache cache_of(const Tensor& recent, const Tensor& state, const Tensor& threshold, const Tensor& hold) {
  const int64_t B = recent.size(0), HK = recent.size(1), D = recent.size(3);
  STD_TORCH_CHECK(recent.dim() == 4 && hold.dim() == 3 && hold.size(0) == B && hold.size(1) == HK &&
                      hold.size(2) == D && hold.scalar_type() == recent.scalar_type() && threshold.is_contiguous() &&
                      threshold.numel() == HK * D && threshold.scalar_type() == accumulator(recent) &&
                      state.is_contiguous() && state.numel() == 3 * B && state.scalar_type() == ScalarType::Long,
                  "delta_kv_cache: recent must be [B, HK, slots, D], hold [B, HK, D], threshold [HK, D], state [B, 3]");
  DeltaCache c{};
  c.type = type_of(recent);
  c.D = int(D);
  c.HK = HK;
  c.rows = static_cast<const DeltaCacheRow*>(state.data_ptr());
  for (int64_t b = 0; b < B; b++) {
    const DeltaCacheRow& row = c.rows[b];
    STD_TORCH_CHECK(row.first >= 0 && row.sealed >= 0 && row.sealed % kDecodeKeys == 0 && row.length >= row.sealed &&
                        row.first + row.length - row.sealed <= recent.size(2),
                    "delta_kv_cache: the state does not fit the recent keys");
  }
  c.recent = view(recent, 3);
  c.hold = view(hold, 2);
  c.threshold = bytes_of(threshold);
  return c;
}

void add_records(DeltaCache& c, const Tensor& records, const Tensor& places, int64_t B) {
  STD_TORCH_CHECK(places.dim() == 4 && places.size(0) == B && places.size(1) == c.HK && places.size(3) == 2 &&
                      places.is_contiguous() && places.scalar_type() == ScalarType::Long && records.is_contiguous() &&
                      records.scalar_type() == ScalarType::Byte,
                  "delta_kv_cache: places must be [B, HK, blocks, 2], records bytes");
  c.records = bytes_of(records);
  c.places = static_cast<const int64_t*>(places.data_ptr());
  c.blocks = places.size(2);
  for (int64_t b = 0; b < B; b++)
    STD_TORCH_CHECK(c.rows[b].sealed <= c.blocks * kDecodeKeys, "delta_kv_cache: a sealed block has no place");
}

// Room for a part of a cache: each token that is decoded reads all of it.
Tensor room(const Tensor& like, std::vector<int64_t> size) {
  constexpr int64_t kLeast = 4 << 20;
  return in_huge_pages(torch::stable::new_empty(like, size), kLeast);
}

// places: [sum of blocks, HK, 2], row by row of the batch, within `records`.
std::tuple<Tensor, Tensor> seal(const Tensor& recent, const Tensor& state, std::vector<int64_t> blocks,
                                const Tensor& threshold, Tensor hold) {
  const DeltaCache c = cache_of(recent, state, threshold, hold);
  const int64_t B = recent.size(0), HK = c.HK;
  STD_TORCH_CHECK(int64_t(blocks.size()) == B, "delta_kv_cache_seal: blocks must have B values");
  std::vector<int64_t> before(B + 1, 0);
  for (int64_t b = 0; b < B; b++) {
    const DeltaCacheRow& row = c.rows[b];
    STD_TORCH_CHECK(blocks[b] >= 0 && blocks[b] * kDecodeKeys <= row.length - row.sealed,
                    "delta_kv_cache_seal: there are not so many recent keys");
    before[b + 1] = before[b] + blocks[b];
  }
  const int64_t count = before[B];
  const DeltaCacheKernels& run = kernels();
  const int64_t most = run.record_bytes(c);
  Tensor places = torch::stable::new_empty(recent, {count, HK, 2}, ScalarType::Long);
  Tensor roomy = torch::stable::new_empty(recent, {count * HK * most + B * HK * kRecordSlack}, ScalarType::Byte);
  int64_t* place = static_cast<int64_t*>(places.data_ptr());
  const auto room = [&](int64_t b, int64_t head) {
    return bytes_of(roomy) + (before[b] * HK + head * blocks[b]) * most + (b * HK + head) * kRecordSlack;
  };
  const bool serial = count * HK * kDecodeKeys * c.D < kSerialKeys;
  parallel_tasks(recent, B * HK, serial, 0, [&](int64_t task, void*) {
    const int64_t b = task / HK, head = task % HK;
    run.seal(c, b, head, blocks[b], room(b, head), place + (before[b] * HK + head) * 2 + 1, 2 * HK);
  });
  // The heads' records of a block follow one another.
  int64_t total = 0;
  for (int64_t i = 0; i < count * HK; i++) {
    place[2 * i] = total;
    total += place[2 * i + 1];
  }
  Tensor records = torch::stable::new_empty(recent, {total}, ScalarType::Byte);
  parallel_tasks(recent, B * HK, serial, 0, [&](int64_t task, void*) {
    const int64_t b = task / HK, head = task % HK;
    const char* from = room(b, head);
    for (int64_t block = before[b]; block < before[b + 1]; block++) {
      const int64_t* to = place + 2 * (block * HK + head);
      std::memcpy(bytes_of(records) + to[0], from, to[1]);
      from += to[1];
    }
  });
  return {records, places};
}

Tensor attend(const Tensor& q, const Tensor& records, const Tensor& places, const Tensor& recent, const Tensor& values,
              const Tensor& sinks, const Tensor& hold, const Tensor& threshold, const Tensor& state,
              const Tensor& positions, int64_t window, bool block_mode, double scale) {
  DeltaCacheAttention a{};
  a.cache = cache_of(recent, state, threshold, hold);
  DeltaCache& c = a.cache;
  const int64_t B = recent.size(0), HK = c.HK, D = c.D, Tq = q.size(1), HQ = q.size(2), DV = values.size(3);
  add_records(c, records, places, B);
  const ScalarType dtype = recent.scalar_type();
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == B && q.size(3) == D && HQ % HK == 0 && values.dim() == 4 &&
                      values.size(0) == B && values.size(1) == HK && sinks.dim() == 4 && sinks.size(0) == B &&
                      sinks.size(1) == HK && sinks.size(3) == D && positions.dim() == 2 && positions.size(0) == B &&
                      positions.size(1) == Tq && positions.is_contiguous() && window >= 1 &&
                      positions.scalar_type() == ScalarType::Long && q.scalar_type() == dtype &&
                      values.scalar_type() == dtype && sinks.scalar_type() == dtype,
                  "delta_kv_cache_attend: q must be [B, Tq, HQ, D], values [B, HK, slots, DV], sinks [B, HK, sink, D], "
                  "positions [B, Tq]");
  c.DV = int(DV);
  c.sinks = view(sinks, 3);
  c.sink = sinks.size(2);
  Tensor o = torch::stable::new_empty(q, {B, Tq, HQ, DV});
  a.q = view(q, 3);
  a.o = view(o, 3);
  a.values = view(values, 3);
  a.positions = static_cast<const int64_t*>(positions.data_ptr());
  a.Tq = Tq;
  a.group = HQ / HK;
  a.window = window;
  a.blocks = block_mode;
  a.scale = scale;

  // The held keys that are not packed: all that some query sees so, in whole blocks.
  std::vector<int64_t> zone(B, 0);
  int64_t longest = 0, most_zone = 0;
  for (int64_t b = 0; b < B; b++) {
    const DeltaCacheRow& row = c.rows[b];
    longest = std::max(longest, row.length);
    int64_t end = 0;
    for (int64_t i = 0; i < Tq; i++) {
      const int64_t position = a.positions[b * Tq + i];
      STD_TORCH_CHECK(position < row.length && (position < 0 || a.exact_from(position) >= row.sealed),
                      "delta_kv_cache_attend: a query's exact keys are not there");
      end = std::max(end, a.exact_from(position));
    }
    STD_TORCH_CHECK(row.length <= values.size(2), "delta_kv_cache_attend: fewer values than keys");
    zone[b] = std::min(ceil_div(std::max<int64_t>(end - row.sealed, 0), kDecodeKeys) * kDecodeKeys,
                       row.length - row.sealed);
    most_zone = std::max(most_zone, zone[b]);
  }
  const DeltaCacheKernels& run = kernels();
  Tensor held = torch::stable::new_empty(recent, {B, HK, most_zone, D});
  a.held = view(held, 3);
  a.zone = zone.data();
  const int64_t element = recent.element_size();
  parallel_tasks(recent, most_zone ? B * HK : 0, B * HK * most_zone * D < kSerialKeys, 0, [&](int64_t task, void*) {
    const int64_t b = task / HK, head = task % HK;
    char* out = bytes_of(held) + task * most_zone * D * element;
    run.hold_rows(c, b, head, zone[b], out);
    for (int64_t s = c.rows[b].sealed; s < std::min(c.sink, c.rows[b].sealed + zone[b]); s++) {
      const View& from = c.sinks;
      std::memcpy(out + (s - c.rows[b].sealed) * D * element,
                  from.data + (b * from.stride[0] + head * from.stride[1] + s * from.stride[2]) * element, D * element);
    }
  });

  std::vector<int64_t> length(B);
  for (int64_t b = 0; b < B; b++) length[b] = c.rows[b].length;
  const int64_t partial_bytes = run.partial_bytes(a);
  run_decode(q, {HK, Tq * a.group, length, partial_bytes, run.scratch(a), B * longest * HQ * Tq * D < kSerialDecode},
             [&](const DecodeRows& rows, int64_t begin, int64_t end, char* partial, void* scratch) {
               run.part(a, rows, begin, end, partial, scratch);
             },
             [&](const DecodeRows& rows, const char* partials, int64_t count, void* scratch) {
               run.combine(a, rows, partials, partial_bytes, count, scratch);
             });
  return o;
}

// K_hat of every key, [B, HK, longest, D]; what lies behind a row's length is 0.
Tensor held(const Tensor& records, const Tensor& places, const Tensor& recent, const Tensor& hold,
            const Tensor& threshold, const Tensor& state) {
  DeltaCache c = cache_of(recent, state, threshold, hold);
  const int64_t B = recent.size(0), HK = c.HK, row_bytes = c.D * recent.element_size();
  add_records(c, records, places, B);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; b++) longest = std::max(longest, c.rows[b].length);
  Tensor result = torch::stable::new_zeros(recent, {B, HK, longest, c.D});
  const DeltaCacheKernels& run = kernels();
  parallel_tasks(recent, B * HK, B * HK * longest * c.D < kSerialKeys, 0, [&](int64_t task, void*) {
    const int64_t b = task / HK, head = task % HK;
    const DeltaCacheRow& row = c.rows[b];
    char* out = bytes_of(result) + task * longest * row_bytes;
    for (int64_t j = 0; j < row.sealed; j += kDecodeKeys)
      run.unpack(c, b, head, j / kDecodeKeys, out + j * row_bytes);
    run.hold_rows(c, b, head, row.length - row.sealed, out + row.sealed * row_bytes);
  });
  return result;
}

}  // namespace
}  // namespace fla_ops

STABLE_TORCH_LIBRARY_IMPL(fla_ops, CPU, m) {
  m.impl("delta_kv_cache_room", TORCH_BOX(&fla_ops::room));
  m.impl("delta_kv_cache_seal", TORCH_BOX(&fla_ops::seal));
  m.impl("delta_kv_cache_attend", TORCH_BOX(&fla_ops::attend));
  m.impl("delta_kv_cache_held", TORCH_BOX(&fla_ops::held));
}
