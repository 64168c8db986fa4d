// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of the selective scan (selective_scan_cpu.cpp) hands to its kernels
// (selective_scan_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
#pragma once

#include <stdint.h>

#include "view.h"

namespace fla_ops {

constexpr int kScanTile = 64;  // steps of a tile, and from one saved state to the next
constexpr int kScanMaxState = 256;
constexpr int kScanGroup = 4;  // states that are worked on together

// Vectors of channels are blocks of this many bytes, whatever the instruction level: a cache line.
constexpr int kScanBlockBytes = 64;

// B or C: [B, G, N, L], or the constant [Di, N], for which the strides of B and L are 0 and there are Di groups.
struct ScanProjection {
  char* data = nullptr;
  Type type = Type::float32;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t group_size = 1;  // channels of a group
  bool constant = false;
  // [B * G, ceil(N / 4), pitch, 4] of the arithmetic type where all channels of a block share it, else null.
  char* packed = nullptr;
  int64_t pitch = 0;
};

// Channels [begin, end) are one task's: of one group, or whole groups. `index` counts the parts.
struct ScanPart {
  int64_t begin, end, index;
};

// A sequence and the row of `states` that its first tile has.
struct ScanSequence : Sequence {
  int64_t checkpoint;
};

// "The arithmetic type" is double if u is, else float. Pointers and views may be null where marked.
struct SelectiveScan {
  View u, delta, z;          // [B, Di, L]; z or null
  View A;                    // [Di, N]
  View D, delta_bias;        // [Di] or null
  ScanProjection B, C;
  View initial_state;        // [S, Di, N] or null
  char* states;              // [rows, Di, N] of the arithmetic type, the state before each tile; or null
  int64_t Di;
  int N;
  bool softplus;
  View y;                    // forward: [B, Di, L]
  char* final_state;         // forward: [S, Di, N] of the arithmetic type
};

// What the backward adds: gradients, null where not needed. A sum over channels comes in parts, one for each task that
// has channels of the group, and a sum over the batch in one row a batch entry; a ScanSum adds them up in order.
struct SelectiveScanBackward {
  SelectiveScan scan;
  int64_t B, L;
  View dy, dfinal_state;     // [B, Di, L]; [S, Di, N] or null
  View du, ddelta, dz;       // [B, Di, L]
  char *dA, *dD, *dbias;     // [B, Di, N], [B, Di], [B, Di] of the arithmetic type
  char *dB, *dC;             // [B, Di, N] for a constant, else [B, G, slots, N, L], zeros at first
  const int64_t *first_part_B, *first_part_C;  // by group: the index of its first part
  int64_t slots_B, slots_C;  // most parts of a group
  char* dinitial_state;      // [S, Di, N] of the arithmetic type

  // The row of dA that a task's sequences belong to.
  int64_t entry(const ScanSequence* first) const { return B > 1 ? first->batch : 0; }
};

// out[i / middle, i % middle, k, :] = the sum of `count` terms, terms + i outer_stride + k length, term_stride apart.
struct ScanSum {
  const char* terms;  // of the arithmetic type
  int64_t count, term_stride, outer_stride, middle, inner, length;  // `inner` values of k
  char* out;
  Type out_type;
  int64_t out_stride[4];
};

struct SelectiveScanStep {
  View u, delta, z, y;     // [B, Di]; z or null
  View A;                  // [Di, N]
  View D, delta_bias;      // [Di] or null
  View B, C;               // [B, G, N]
  View state;              // [slots, Di, N]
  int64_t Di, size_B, size_C;  // channels, and those of a group
  int N;
  bool softplus;
};

struct SelectiveScanKernels {
  // Rows [begin, end) of packed B or C: one for each batch entry, group and four states.
  void (*pack)(const ScanProjection&, int64_t groups, int N, int64_t L, int64_t begin, int64_t end, bool is_double);
  int64_t (*forward_scratch)(int N, bool per_lane, bool is_double);
  // One part of the channels, all of the sequences in order.
  void (*forward)(const SelectiveScan&, const ScanPart&, const ScanSequence* first, int64_t sequences, void* scratch);
  int64_t (*backward_scratch)(int N, bool per_lane, bool is_double);
  void (*backward)(const SelectiveScanBackward&, const ScanPart&, const ScanSequence* first, int64_t sequences,
                   void* scratch);
  // Rows [begin, end), numbered i * inner + k.
  void (*add_terms)(const ScanSum&, int64_t begin, int64_t end, bool is_double);
  // Channels [begin, end) of one batch entry; slot < 0 gives 0 and touches no state.
  void (*step)(const SelectiveScanStep&, int64_t batch, int64_t slot, int64_t begin, int64_t end);
};

namespace base { extern const SelectiveScanKernels selective_scan; }
namespace avx2 { extern const SelectiveScanKernels selective_scan; }
namespace avx512 { extern const SelectiveScanKernels selective_scan; }

}  // namespace fla_ops
