// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of the causal convolution (causal_conv1d_cpu.cpp) hands to its kernels
// (causal_conv1d_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
#pragma once

#include <stdint.h>

#include "view.h"

namespace fla_ops {

constexpr int kMaxConvWidth = 8;
constexpr int kConvChunk = 64;  // tokens in one task of the channel-last kernels

// The tokens [begin, end) of a sequence, counted from its start; at most kConvChunk of them.
struct ConvChunk {
  Sequence sequence;
  int64_t begin, end;
};

// "The arithmetic type" is double if x is, else float. Pointers and views may be null where marked.
struct CausalConv1d {
  View x;                 // [B, D, L]
  View initial_state;     // [N, D, W-1], null for zeros
  const void* taps;       // [W+1, tap_pitch] of the arithmetic type: weight transposed, then the bias
  int64_t tap_pitch;      // D rounded up to whole vectors
  int64_t D;
  int W;
  bool silu;
  View y, final_state;    // forward: [B, D, L] and [N, D, W-1] of the arithmetic type
  View dy, dfinal_state;  // backward: [B, D, L] and [N, D, W-1], the second or null
  View dx;                // [B, D, L] or null
  View dinitial_state;    // [N, D, W-1] of the arithmetic type, or null
  double* sums;           // [parts, W+1, D]: dweight transposed, then dbias; or null
};

struct CausalConv1dStep {
  View x, y;          // [B, D]
  View weight, bias;  // [D, W], [D] or null
  View state;         // [slots, D, W-1]
  int64_t D;
  int W;
  bool silu;
};

struct CausalConv1dKernels {
  void (*pack_taps)(void* taps, int64_t tap_pitch, const View& weight, const View& bias, int64_t D, int W,
                    bool is_double);
  // Unit stride over time. One sequence, one channel; backward adds to sums[part].
  void (*forward_channel)(const CausalConv1d&, const Sequence&, int64_t channel);
  void (*backward_channel)(const CausalConv1d&, const Sequence&, int64_t channel, int64_t part);
  // Unit stride over channels. One chunk, channels [begin, end), where begin is a multiple of 64.
  void (*forward_chunk)(const CausalConv1d&, const ConvChunk&, int64_t begin, int64_t end);
  // The same; `scratch` holds 2 * W rows of tap_pitch elements of the arithmetic type.
  void (*backward_chunk)(const CausalConv1d&, const ConvChunk&, int64_t begin, int64_t end, int64_t part,
                         void* scratch);
  // dweight [D, W] and dbias [D] from the sums of all parts, added in order; either may be null.
  void (*reduce)(const double* sums, int64_t parts, int64_t D, int W, const View& dweight, const View& dbias);
  // Channels [begin, end) of one batch entry; slot < 0 gives 0 and touches no state.
  void (*step)(const CausalConv1dStep&, int64_t batch, int64_t slot, int64_t begin, int64_t end);
};

namespace base { extern const CausalConv1dKernels causal_conv1d; }
namespace avx2 { extern const CausalConv1dKernels causal_conv1d; }
namespace avx512 { extern const CausalConv1dKernels causal_conv1d; }

}  // namespace fla_ops
