// SPDX-License-Identifier: Apache-2.0
//
// A small vector layer shared by the CPU kernels: one source, three instruction levels.
//
// Vectors are GCC/Clang vector extensions whose width follows FLA_OPS_LEVEL (0 portable: 16 bytes,
// 1 AVX2: 32, 2 AVX-512: 64), so arithmetic, comparison and `mask ? a : b` are plain operators and
// `acc += s * v` becomes a fused multiply-add with a broadcast where the level has one.
//
// Everything lives in an anonymous namespace: code compiled for AVX-512 must never be merged by the
// linker with the portable build of the same function. For the same reason nothing here pulls in
// a standard header that defines functions out of line.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "view.h"

#ifndef FLA_OPS_LEVEL
#error "define FLA_OPS_LEVEL (0 portable, 1 AVX2, 2 AVX-512) before including simd.h"
#endif
#if FLA_OPS_LEVEL >= 1
#include <immintrin.h>
#endif

#define FLA_INLINE inline __attribute__((always_inline))
#define FLA_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kVectorBytes = 16 << FLA_OPS_LEVEL;
// Vector registers the compiler can hold at once: sizes the register blocks in tile_gemm.h.
#if FLA_OPS_LEVEL == 2 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// The storage types of tensors that have no type of their own in C++.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  // Loads and stores need only the alignment of one element.
  typedef T memory __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T> using vec = typename VectorOf<T>::type;
template <class T> constexpr int kWidth = kVectorBytes / int(sizeof(T));

template <class T> struct Bits;
template <> struct Bits<float> { using type = int32_t; };
template <> struct Bits<double> { using type = int64_t; };

template <class To, class From> FLA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// ------------------------------------------------------------------------------ scalar conversions

FLA_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FLA_INLINE bf16 to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

FLA_INLINE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // Shifted into float's place the exponent is 112 too small; the multiplication also makes
  // subnormal halves normal. Infinity and NaN keep an all-ones exponent.
  float f = bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) f = bit_cast<float>(0x7f800000u | (magnitude << 13));
  return bit_cast<float>(bit_cast<uint32_t>(f) | sign);
}

FLA_INLINE fp16 to_fp16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (a >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (a < 0x38800000) {  // subnormal half: let the float adder round at 2^-24
    const float f = bit_cast<float>(a) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(f) - 0x3f000000))};
  }
  return {uint16_t(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13))};
}

template <class A> FLA_INLINE A load_scalar(const double* p) { return A(*p); }
template <class A> FLA_INLINE A load_scalar(const float* p) { return A(*p); }
template <class A> FLA_INLINE A load_scalar(const bf16* p) { return A(to_float(*p)); }
template <class A> FLA_INLINE A load_scalar(const fp16* p) { return A(to_float(*p)); }
template <class A> FLA_INLINE void store_scalar(double* p, A x) { *p = double(x); }
template <class A> FLA_INLINE void store_scalar(float* p, A x) { *p = float(x); }
template <class A> FLA_INLINE void store_scalar(bf16* p, A x) { *p = to_bf16(float(x)); }
template <class A> FLA_INLINE void store_scalar(fp16* p, A x) { *p = to_fp16(float(x)); }

// Calls f with the data as a pointer to the storage type.
template <class F> FLA_INLINE void with_type(fla_ops::Type type, char* data, const F& f) {
  switch (type) {
    case fla_ops::Type::float64: return f(reinterpret_cast<double*>(data));
    case fla_ops::Type::float32: return f(reinterpret_cast<float*>(data));
    case fla_ops::Type::bfloat16: return f(reinterpret_cast<bf16*>(data));
    case fla_ops::Type::float16: return f(reinterpret_cast<fp16*>(data));
  }
}

// -------------------------------------------------------------------------------- vector load, store

template <class T> FLA_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::memory*>(p);
}
template <class T> FLA_INLINE void store(T* p, vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::memory*>(p) = x;
}
// A scalar operand is repeated in one instruction; lane by lane, GCC goes through memory.
template <class T> FLA_INLINE vec<T> broadcast(T x) { return x - vec<T>{}; }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfBitsMemory __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(kVectorBytes)));

FLA_INLINE HalfBits load_half_bits(const void* p) {
  return *static_cast<const HalfBitsMemory*>(p);
}
FLA_INLINE void store_half_bits(void* p, HalfBits x) { *static_cast<HalfBitsMemory*>(p) = x; }

// load_as<A>(p): kWidth<A> elements from p, converted to A.
template <class A> FLA_INLINE vec<A> load_as(const A* p) { return load(p); }

template <class A> FLA_INLINE vec<A> load_as(const bf16* p) {
  static_assert(sizeof(A) == 4);
  return bit_cast<vec<float>>(__builtin_convertvector(load_half_bits(p), WordBits) << 16);
}
#if FLA_OPS_LEVEL == 2
// Some AVX-512 processors round to bfloat16 themselves, in one instruction in place of nine. They take subnormal
// numbers for zero.
const bool kRoundsToBf16 = __builtin_cpu_supports("avx512bf16");
#endif
FLA_INLINE void store_as(bf16* p, vec<float> x) {
#if FLA_OPS_LEVEL == 2
  if (kRoundsToBf16) {
    HalfBits rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));
    return store_half_bits(p, rounded);
  }
#endif
  const WordBits u = bit_cast<WordBits>(x);
  const WordBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const WordBits nan = (u >> 16) | 0x40;
  store_half_bits(p, __builtin_convertvector(x != x ? nan : rounded, HalfBits));
}

template <class A> FLA_INLINE vec<A> load_as(const fp16* p) {
  static_assert(sizeof(A) == 4);
#if FLA_OPS_LEVEL == 2
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FLA_OPS_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const WordBits h = __builtin_convertvector(load_half_bits(p), WordBits);
  const WordBits magnitude = h & 0x7fff;
  const WordBits finite = bit_cast<WordBits>(bit_cast<vec<float>>(magnitude << 13) * 0x1p112f);
  const WordBits f = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite;
  return bit_cast<vec<float>>(f | ((h & 0x8000) << 16));
#endif
}
FLA_INLINE void store_as(fp16* p, vec<float> x) {
#if FLA_OPS_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
#elif FLA_OPS_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth<float>; i++) p[i] = to_fp16(x[i]);
#endif
}
FLA_INLINE void store_as(float* p, vec<float> x) { store(p, x); }
FLA_INLINE void store_as(double* p, vec<double> x) { store(p, x); }

// Conversions between widths are rare (a double state under float inputs): lane by lane.
template <class A> FLA_INLINE vec<A> load_lanes(const auto* p) {
  vec<A> x;
  for (int i = 0; i < kWidth<A>; i++) x[i] = load_scalar<A>(p + i);
  return x;
}
template <class A, class T> constexpr bool kVectorConverts =
    __is_same(A, T) || (sizeof(A) == 4 && sizeof(T) == 2);

template <class A, class T> FLA_INLINE vec<A> load_any(const T* p) {
  if constexpr (kVectorConverts<A, T>) return load_as<A>(p);
  else return load_lanes<A>(p);
}
template <class A, class T> FLA_INLINE void store_any(T* p, vec<A> x) {
  if constexpr (kVectorConverts<A, T>) store_as(p, x);
  else for (int i = 0; i < kWidth<A>; i++) store_scalar(p + i, x[i]);
}

// n elements from src to dst. The last vector overlaps the one before it, so that an odd n costs
// one more vector and nothing outside [0, n) is touched on either side.
template <class A, class T> FLA_INLINE void load_row(A* dst, const T* src, int n) {
  constexpr int W = kWidth<A>;
  int i = 0;
  for (; i + W <= n; i += W) store(dst + i, load_any<A>(src + i));
  if (i == n) return;
  if (n >= W) store(dst + n - W, load_any<A>(src + n - W));
  else for (; i < n; i++) dst[i] = load_scalar<A>(src + i);
}
template <class A, class T> FLA_INLINE void store_row(T* dst, const A* src, int n) {
  constexpr int W = kWidth<A>;
  int i = 0;
  for (; i + W <= n; i += W) store_any<A>(dst + i, load(src + i));
  if (i == n) return;
  if (n >= W) store_any<A>(dst + n - W, load(src + n - W));
  else for (; i < n; i++) store_scalar(dst + i, src[i]);
}

// ---------------------------------------------------------------------------------------- transpose

template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> { using type = Indices<I...>; };

// Exchanges the off-diagonal Step x Step blocks of the rows a and b.
template <int Step, class T, int... I>
FLA_INLINE void exchange(vec<T>& a, vec<T>& b, Indices<I...>) {
  constexpr int W = kWidth<T>;
  const vec<T> upper = __builtin_shufflevector(a, b, ((I & Step) ? W + I - Step : I)...);
  const vec<T> lower = __builtin_shufflevector(a, b, ((I & Step) ? W + I : I + Step)...);
  a = upper;
  b = lower;
}

template <int Step, class T> FLA_INLINE void transpose_steps(vec<T> (&x)[kWidth<T>]) {
  constexpr int W = kWidth<T>;
  if constexpr (Step < W) {
    FLA_UNROLL for (int i = 0; i < W; i++)
      if ((i & Step) == 0) exchange<Step, T>(x[i], x[i + Step], typename MakeIndices<W>::type{});
    transpose_steps<Step * 2, T>(x);
  }
}

// dst[c][r] = src[r][c] for one square block of kWidth<T> rows, converted on the way where the types differ.
template <class T, class From, class To>
FLA_INLINE void transpose_block(To* dst, ptrdiff_t dst_stride, const From* src, ptrdiff_t src_stride) {
  constexpr int W = kWidth<T>;
  vec<T> x[W];
  FLA_UNROLL for (int i = 0; i < W; i++) x[i] = load_any<T>(src + i * src_stride);
  transpose_steps<1, T>(x);
  FLA_UNROLL for (int i = 0; i < W; i++) store_any<T>(dst + i * dst_stride, x[i]);
}

// rows and columns are rounded up to whole blocks: both buffers have to be padded.
template <class T>
FLA_INLINE void transpose(T* dst, ptrdiff_t dst_stride, const T* src, ptrdiff_t src_stride, int rows,
                      int columns) {
  constexpr int W = kWidth<T>;
  for (int r = 0; r < rows; r += W)
    for (int c = 0; c < columns; c += W)
      transpose_block<T>(dst + c * dst_stride + r, dst_stride, src + r * src_stride + c, src_stride);
}

// ---------------------------------------------------------------------------------------------- exp

// e^x to about 1 ulp over the whole range: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in r,
// and 2^n in two factors so that subnormal results and overflow to infinity come out right.
// The comparisons let NaN through; -inf gives exactly 0.
FLA_INLINE vec<float> exp(vec<float> x) {
  using V = vec<float>;
  using I = decltype(x < x);
  const V low = broadcast(-104.0f), high = broadcast(89.0f);
#if FLA_OPS_LEVEL == 2
  // One instruction each where GCC makes two of the comparison and the choice; NaN is the second operand's.
  x = _mm512_min_ps(high, _mm512_max_ps(low, x));
#else
  x = x < low ? low : x;
  x = x > high ? high : x;
#endif
  const V shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const V n = shifted - 0x1.8p23f;
  const V r = (x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  V p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r * r + r;
#if FLA_OPS_LEVEL == 2
  return _mm512_scalef_ps(1.0f + p, n);
#endif
  const I i = bit_cast<I>(shifted) - 0x4b400000;
  const I half = i >> 1;
  return ((1.0f + p) * bit_cast<V>((half + 127) << 23)) * bit_cast<V>((i - half + 127) << 23);
}

FLA_INLINE vec<double> exp(vec<double> x) {
  using V = vec<double>;
  using I = decltype(x < x);
  const V low = broadcast(-746.0), high = broadcast(710.0);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const V n = shifted - 0x1.8p52;
  const V r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  V p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r;
  const I i = bit_cast<I>(shifted) - 0x4338000000000000;
  const I half = i >> 1;
  return ((1.0 + p) * bit_cast<V>((half + 1023) << 52)) * bit_cast<V>((i - half + 1023) << 52);
}

}  // namespace
