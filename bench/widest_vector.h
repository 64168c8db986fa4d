// SPDX-License-Identifier: Apache-2.0
//
// The widest vectors that the flags allow, for the probes of the machine's limits: wider ones would be taken apart.
#pragma once

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Vector __attribute__((vector_size(kBytes)));
