// SPDX-License-Identifier: Apache-2.0
//
// A tensor as the CPU kernels see it: what the torch side hands over.
#pragma once

#include <stdint.h>

namespace fla_ops {

enum class Type : int { float64, float32, bfloat16, float16 };

// Strides in elements, outermost first.
struct View {
  char* data = nullptr;
  Type type = Type::float32;
  int64_t stride[3] = {0, 0, 0};
};

}  // namespace fla_ops
