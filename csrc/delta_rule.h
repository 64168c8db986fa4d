// SPDX-License-Identifier: Apache-2.0
//
// What the CPU and CUDA kernels of the delta rule and of DeltaProduct agree on with their callers.
#pragma once

namespace fla_ops {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxHouseholder = 8;  // DeltaProduct's steps a token
constexpr int kCheckpointTokens = 64;  // training keeps one state per this many tokens

// Bits of the gradients asked for.
enum Needs : int { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedBeta = 8, kNeedG = 16, kNeedState = 32 };

}  // namespace fla_ops
