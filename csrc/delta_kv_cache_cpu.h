// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of DeltaLLM's cache (delta_kv_cache_cpu.cpp) hands to its kernels
// (delta_kv_cache_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
//
// A row of the batch has its first `sealed` keys, a multiple of kDecodeKeys, in packed records, and the others as they
// came. The record of a key head's block of keys, for which K_hat is the held key of each:
//
//   K_hat of the first key, D elements          the anchor: blocks can be read in any order
//   a bitmap for each of the other keys         bit c: channel c fired; whole words of 32 bits
//   the values of the channels that fired       one key after the other, channels in order
#pragma once

#include <stdint.h>

#include "decode_attention_cpu.h"
#include "view.h"

namespace fla_ops {

constexpr int kRecordSlack = 64;  // bytes that a kernel may read behind a record, and write while it packs one

inline int bitmap_words(int D) { return (D + 31) / 32; }

struct DeltaCacheRow {
  int64_t first;   // where the first key that is not sealed lies in `recent`
  int64_t sealed;
  int64_t length;  // all keys
};

struct DeltaCache {
  Type type;
  int D, DV;
  const char* records;
  const int64_t* places;  // [B, HK, blocks, 2]: where a record starts, and its bytes
  int64_t HK, blocks;
  const DeltaCacheRow* rows;  // [B]
  View recent;                // [B, HK, slots, D]
  View sinks;                 // [B, HK, sink, D]
  View hold;                  // [B, HK, D]: K_hat of the last sealed key, NaN before the first
  const char* threshold;      // [HK, D] of the arithmetic type
  int64_t sink;
};

struct DeltaCacheAttention {
  DeltaCache cache;
  View q, o;                 // [B, Tq, HQ, D], [B, Tq, HQ, DV]
  View values;               // [B, HK, slots, DV]
  View held;                 // [B, HK, zone, D]: K_hat of the first keys that are not sealed, sinks exact
  const int64_t* zone;       // [B]: how many of those there are
  const int64_t* positions;  // [B, Tq]: of the queries, -1 for none
  int64_t Tq, group;
  int64_t window;
  bool blocks;               // the window's mode
  double scale;

  // The first key that a query sees exactly.
  int64_t exact_from(int64_t position) const {
    if (position < 0) return 0;
    if (blocks) return position / window * window;
    return position < window ? 0 : position - window + 1;
  }
};

struct DeltaCacheKernels {
  int64_t (*record_bytes)(const DeltaCache&);  // at most
  // Packs `blocks` blocks of row `b`'s recent keys from `first` on, and moves `hold`. Records follow one another in
  // `out`, their bytes go to `bytes`, `bytes_stride` apart.
  void (*seal)(const DeltaCache&, int64_t b, int64_t head, int64_t blocks, char* out, int64_t* bytes,
               int64_t bytes_stride);
  // K_hat of the first `count` keys that are not sealed, D elements each.
  void (*hold_rows)(const DeltaCache&, int64_t b, int64_t head, int64_t count, char* out);
  // K_hat of a sealed block.
  void (*unpack)(const DeltaCache&, int64_t b, int64_t head, int64_t block, char* out);
  int64_t (*scratch)(const DeltaCacheAttention&);
  int64_t (*partial_bytes)(const DeltaCacheAttention&);
  void (*part)(const DeltaCacheAttention&, const DecodeRows&, int64_t begin, int64_t end, char* partial, void* scratch);
  void (*combine)(const DeltaCacheAttention&, const DecodeRows&, const char* partial, int64_t partial_stride,
                  int64_t parts, void* scratch);
};

namespace base { extern const DeltaCacheKernels delta_kv_cache; }
namespace avx2 { extern const DeltaCacheKernels delta_kv_cache; }
namespace avx512 {
extern const DeltaCacheKernels delta_kv_cache;
extern const DeltaCacheKernels delta_kv_cache_vbmi2;  // for processors with AVX512_VBMI2 and AVX512_BF16
}  // namespace avx512

}  // namespace fla_ops
