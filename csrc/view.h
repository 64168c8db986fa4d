// SPDX-License-Identifier: Apache-2.0
//
// Tensors and sequences as the CPU kernels see them: what the torch side hands over.
#pragma once

#include <stdint.h>

namespace fla_ops {

enum class Type : int { float64, float32, bfloat16, float16 };

// Strides in elements, outermost first; a fourth dimension has unit stride and is not listed.
struct View {
  char* data = nullptr;
  Type type = Type::float32;
  int64_t stride[3] = {0, 0, 0};
};

// The tokens [start, start + length) of batch entry `batch`; `index` is its row of the states.
struct Sequence {
  int64_t batch, start, length, index;
};

}  // namespace fla_ops
