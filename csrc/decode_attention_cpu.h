// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of decode attention (decode_attention_cpu.cpp) hands to its kernels
// (decode_attention_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
#pragma once

#include <stdint.h>

#include "view.h"

namespace fla_ops {

constexpr int kDecodeRows = 64;    // rows of queries that read a key together, at most
constexpr int kDecodeKeys = 64;    // keys of a block
constexpr int kDecodePart = 1024;  // keys of a task, a multiple of kDecodeKeys

struct DecodeAttention {
  View q, o;      // [B, Tq, HQ, D], [B, Tq, HQ, DV]
  View k, v;      // [B, T, HK, D], [B, T, HK, DV]
  int64_t Tq;
  int64_t group;  // query heads a key head
  int D, DV;
  double scale;
};

// Rows [first, first + count) of the Tq * group that share key head `head`, row r for token r / group.
struct DecodeRows {
  int64_t batch, head, first;
  int count;
  int64_t length;  // keys of this batch entry; the last token sees them all
};

struct DecodeAttentionKernels {
  int64_t (*scratch)(const DecodeAttention&);
  int64_t (*partial_bytes)(const DecodeAttention&);  // what a task leaves for `combine`
  // Keys [begin, end).
  void (*part)(const DecodeAttention&, const DecodeRows&, int64_t begin, int64_t end, char* partial, void* scratch);
  // o of the rows, from the parts in order.
  void (*combine)(const DecodeAttention&, const DecodeRows&, const char* partial, int64_t partial_stride, int64_t parts,
                  void* scratch);
};

namespace base { extern const DecodeAttentionKernels decode_attention; }
namespace avx2 { extern const DecodeAttentionKernels decode_attention; }
namespace avx512 {
extern const DecodeAttentionKernels decode_attention;
extern const DecodeAttentionKernels decode_attention_bf16;  // for processors with AVX512_BF16
}  // namespace avx512

}  // namespace fla_ops
