// SPDX-License-Identifier: Apache-2.0
//
// What the torch side of the delta rule and of DeltaProduct (delta_rule_cpu_calls.h) hands to their kernels
// ({delta_rule,delta_product}_{base,avx2,avx512}.cpp): plain structs and a table of functions a level.
//
// A token has n micro-steps: 1 in the delta rule. k, v and beta have n rows a token.
#pragma once

#include <stdint.h>

#include "delta_rule.h"
#include "view.h"

namespace fla_ops {

struct CheckpointedSequence : Sequence {
  int64_t first_checkpoint;  // row of the saved states
};

struct DeltaRuleForward {
  View q, k;              // [B, T, H, K] and [B, T n, H, K], strides of B, T, H
  View v;                 // [B, T n, HV, V]
  View beta, g;           // [B, T n, HV] and [B, T, HV], strides of all three; g.data may be null
  View initial_state;     // [N, HV, K, V], strides of N, HV, K; data may be null
  View o;                 // [B, T, HV, V]
  char* final_state;      // [N, HV, K, V], contiguous, float or double as the arithmetic
  char* states;           // [checkpoints, HV, K, V] or null
  int64_t H, HV;
  int K, V, n;
  double scale;
  bool qk_l2norm;
};

struct DeltaRuleBackward {
  DeltaRuleForward inputs;  // `o`, `final_state` unused; `states` holds the checkpoints
  View d_o;                 // [B, T, HV, V]
  View d_final_state;       // [N, HV, K, V]; data may be null
  View dq, dk;              // [B, T, HV, K] and [B, T n, HV, K]: a value head's own part when HV > H
  View dv;                  // [B, T n, HV, V]
  View dbeta, dg;           // [B, T n, HV] and [B, T, HV]
  char* d_initial_state;    // [N, HV, K, V], float or double as the arithmetic
  int needs;                // only these outputs are written
};

// dst[row, h, :] = sum over a head group's parts src[row, h * group + i, :], in order.
struct HeadSum {
  const char* src;  // [rows, H * group, K], float or double
  char* dst;        // [rows, H, K]
  Type type;        // of dst
  int64_t H, group;
  int K;
};

struct DeltaRuleStep {
  View q, k;    // [B, H, K] and [B, n, H, K], strides of B, H
  View v;       // [B, n, HV, V]
  View beta, g; // [B, n, HV] and [B, HV], strides of B, HV; g.data may be null
  int64_t k_micro, v_micro, beta_micro;  // strides of n
  View state;   // [slots, HV, K, V], strides of slots, HV, K
  View o;       // [B, HV, V]
  int64_t H, HV;
  int K, V, n;
  double scale;
  bool qk_l2norm;
};

struct DeltaRuleKernels {
  // Bytes of 64-aligned scratch that one call of `forward` needs.
  int64_t (*forward_scratch)(bool is_double);
  // Columns of V are handed out in multiples of this.
  int (*value_block)(bool is_double);
  // One sequence, one value head, columns [v_begin, v_end).
  void (*forward)(const DeltaRuleForward&, const CheckpointedSequence&, int64_t value_head, int v_begin,
                  int v_end, void* scratch);
  // The same for `backward`: one sequence, one value head.
  int64_t (*backward_scratch)(bool is_double, int n, int K, int V);
  void (*backward)(const DeltaRuleBackward&, const CheckpointedSequence&, int64_t value_head, void* scratch);
  void (*sum_heads)(const HeadSum&, int64_t row_begin, int64_t row_end);
  // One batch entry, one value head; slot < 0 skips: the output is 0, no state is touched.
  void (*step)(const DeltaRuleStep&, int64_t batch, int64_t slot, int64_t value_head);
};

namespace base { extern const DeltaRuleKernels delta_rule, delta_product; }
namespace avx2 { extern const DeltaRuleKernels delta_rule, delta_product; }
namespace avx512 { extern const DeltaRuleKernels delta_rule, delta_product; }

}  // namespace fla_ops
