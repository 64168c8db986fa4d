// SPDX-License-Identifier: Apache-2.0
//
// Register-blocked matrix products for the CPU kernels.
//
// A Tile<T, MR, NV> is MR rows by NV vectors of accumulators. `add` and `subtract` accumulate A * B:
// A is read one scalar at a time and broadcast, with row and column strides known at compile time,
// so that a transposed A costs nothing; B is read as NV vectors a row. Each element's sum runs over
// the inner index in ascending order whatever the tile, so blocking never changes a result's bits.
#pragma once

#include "simd.h"

namespace {

// Columns of a panel in vectors, and the rows of a tile that keep enough sums in flight to hide
// the latency of the multiply-add while the accumulators, one row of B and a scalar stay in registers.
constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;
template <int NV> constexpr int kTileRows = (kVectorRegisters == 32 ? NV <= 2 : NV == 1) ? 8 : 4;

template <class T> constexpr int kPanelColumns = kPanelVectors * kWidth<T>;

template <class T, int MR, int NV> struct Tile {
  static constexpr int W = kWidth<T>;
  vec<T> row[MR][NV];

  FLA_INLINE void zero() {
    FLA_UNROLL for (int r = 0; r < MR; r++)
      FLA_UNROLL for (int n = 0; n < NV; n++) row[r][n] = vec<T>{};
  }
  FLA_INLINE void load_scaled(const T* p, ptrdiff_t stride, T factor) {
    FLA_UNROLL for (int r = 0; r < MR; r++)
      FLA_UNROLL for (int n = 0; n < NV; n++) row[r][n] = factor * load(p + r * stride + n * W);
  }
  FLA_INLINE void store_to(T* p, ptrdiff_t stride) const {
    FLA_UNROLL for (int r = 0; r < MR; r++)
      FLA_UNROLL for (int n = 0; n < NV; n++) store(p + r * stride + n * W, row[r][n]);
  }
  // row[r] *= factors[r]
  FLA_INLINE void scale_rows(const T* factors) {
    FLA_UNROLL for (int r = 0; r < MR; r++)
      FLA_UNROLL for (int n = 0; n < NV; n++) row[r][n] *= factors[r];
  }

  // += A[MR, inner] B[inner, NV vectors], A(r, k) at a[r * RowStride + k * ColStride].
  template <int RowStride, int ColStride>
  FLA_INLINE void add(const T* a, const T* b, ptrdiff_t b_stride, int inner) {
    for (int k = 0; k < inner; k++) {
      vec<T> x[NV];
      FLA_UNROLL for (int n = 0; n < NV; n++) x[n] = load(b + k * b_stride + n * W);
      FLA_UNROLL for (int r = 0; r < MR; r++)
        FLA_UNROLL for (int n = 0; n < NV; n++)
          row[r][n] += a[r * RowStride + k * ColStride] * x[n];
    }
  }
  // The same in partial sums of `Part` terms: 128 keeps the rounding of the widest heads near that of
  // the common ones; 4 is for products whose errors are amplified: with nearly parallel keys a plain
  // sum over 64 elements is 3 times less accurate.
  template <int RowStride, int ColStride, int Part>
  FLA_INLINE void add_in_parts(const T* a, const T* b, ptrdiff_t b_stride, int inner) {
    if (inner <= Part) return add<RowStride, ColStride>(a, b, b_stride, inner);
    for (int k = 0; k < inner; k += Part) {
      Tile part;
      part.zero();
      const int length = inner - k < Part ? inner - k : Part;
      part.template add<RowStride, ColStride>(a + k * ColStride, b + k * b_stride, b_stride, length);
      FLA_UNROLL for (int r = 0; r < MR; r++)
        FLA_UNROLL for (int n = 0; n < NV; n++) row[r][n] += part.row[r][n];
    }
  }
  template <int RowStride, int ColStride>
  FLA_INLINE void subtract(const T* a, const T* b, ptrdiff_t b_stride, int inner) {
    for (int k = 0; k < inner; k++) {
      vec<T> x[NV];
      FLA_UNROLL for (int n = 0; n < NV; n++) x[n] = load(b + k * b_stride + n * W);
      FLA_UNROLL for (int r = 0; r < MR; r++)
        FLA_UNROLL for (int n = 0; n < NV; n++)
          row[r][n] -= a[r * RowStride + k * ColStride] * x[n];
    }
  }
};

// Calls f(Constant<NV>) with the number of vectors of a panel as a compile-time constant.
template <int N> struct Constant { static constexpr int value = N; };

template <class F> FLA_INLINE void with_panel_vectors(int vectors, const F& f) {
  if (vectors == 1) return f(Constant<1>{});
  if constexpr (kPanelVectors == 4) {
    if (vectors == 3) return f(Constant<3>{});
    if (vectors == 4) return f(Constant<4>{});
  }
  f(Constant<2>{});
}

}  // namespace
