// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of temporal-sparse attention (temporal_sparse_attention_cpu.cpp) hands to its kernels
// (temporal_sparse_attention_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
#pragma once

#include <stdint.h>

#include "view.h"

namespace fla_ops {

constexpr int kQueryBlock = 96;  // queries that share the walk over the keys
constexpr int kSegment = 64;     // keys of a tile, and from one full held key to the next
constexpr int kSparseMaxHeadDim = 256;

// The held keys of a segment, from element `start` of the packed keys on: the held row of its first key, then by how
// much changed what fired at each later key, and from entry `rows` of packed_rows on, which channels that were; or, if
// `dense`, the held rows of all its keys.
struct Segment {
  int64_t start, rows;
  bool dense;
};

// A sequence and the index of its first segment.
struct SegmentedSequence : Sequence {
  int64_t first_segment;
};

// "The arithmetic type" is double if q is, else float.
struct TemporalSparseAttention {
  View q, k, v, o;            // [B, Tq, HQ, D], [B, T, HK, D], [B, T, HK, DV], [B, Tq, HQ, DV]
  const char* threshold;      // [HK, D] of the arithmetic type
  int64_t T, Tq;
  int HQ, HK, D, DV;
  double scale;
  int64_t window, sink;
  bool blocks;                // the window is the query's block of `window` tokens, not a band
  bool holds;                 // whether any score takes a held key
  int64_t segments_total;
  Segment* segments;          // [HK, segments_total]; null unless `holds`
  char* packed;               // [B, HK, T, held_pitch()] if `holds`, in segments, else [B, HK, T, D]; arithmetic type
  uint16_t* packed_rows;      // [B, HK, T, held_pitch()] if `holds`
  char* held;                 // [B, HK, T, key_pitch()] of the arithmetic type: held keys, for the backward; or null
  char* values;               // [B, HK, T, value_pitch()] of the arithmetic type
  int32_t* fired;             // [B, HK, T]: channels that fired; null if neither held nor asked for
  char* norms;                // [B, HQ, Tq, 2] of the arithmetic type: the largest score m, 1 / the sum of weights

  // Position i of a sequence is row s.start + i - (T - Tq) of q.
  int64_t first_query() const { return T - Tq; }
  // Room for a whole row, or as many changes as there are channels; lists are written past their end, by a vector.
  int64_t held_pitch() const { return D + 16; }
  int key_pitch() const { return (D + 15) / 16 * 16; }
  int value_pitch() const { return (DV + 15) / 16 * 16; }
};

// What the backward adds. Buffers are of the arithmetic type; gradients are null where not needed.
struct TemporalSparseBackward {
  TemporalSparseAttention c;      // with o and norms
  View dout;                      // [B, Tq, HQ, DV]
  char* keys;                     // [B, HK, T, key_pitch()]
  char *dkeys, *dheld, *dvalues;  // [B, HQ, T, key_pitch() or value_pitch()], zeros at first
  View dq, dk, dv;                // like q, k, v
};

struct TemporalSparseAttentionKernels {
  int64_t (*pack_scratch)(bool is_double);
  // Segments, packed keys and values, and counts of what fired, of one sequence and key head.
  void (*pack)(const TemporalSparseAttention&, const SegmentedSequence&, int64_t key_head, void* scratch);
  int64_t (*forward_scratch)(int D, int value_pitch, bool is_double);
  // The queries at positions [begin, end) of a sequence, at most kQueryBlock, of one query head.
  void (*forward)(const TemporalSparseAttention&, const SegmentedSequence&, int64_t head, int64_t begin, int64_t end,
                  void* scratch);
  // Also what `pack` does, of one sequence and key head.
  void (*pack_keys)(const TemporalSparseBackward&, const SegmentedSequence&, int64_t key_head, void* scratch);
  int64_t (*backward_scratch)(int D, int DV, bool is_double);
  // dq of one query head of a sequence, and its part of dkeys, dheld and dvalues.
  void (*backward)(const TemporalSparseBackward&, const SegmentedSequence&, int64_t head, void* scratch);
  // dk and dv of one key head of a sequence.
  void (*finish)(const TemporalSparseBackward&, const SegmentedSequence&, int64_t key_head);
};

namespace base { extern const TemporalSparseAttentionKernels temporal_sparse_attention; }
namespace avx2 { extern const TemporalSparseAttentionKernels temporal_sparse_attention; }
namespace avx512 { extern const TemporalSparseAttentionKernels temporal_sparse_attention; }

}  // namespace fla_ops
