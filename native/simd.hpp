// Vectors of MIDL_LANES floats, written once and compiled per instruction set.
//
// Everything that is compiled with instruction-set flags lives in an anonymous namespace: an inline function shared
// between translation units could otherwise be linked in its AVX-512 version into the baseline kernels.
#pragma once

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef MIDL_LANES
#error "MIDL_LANES must be defined by the build"
#endif

#define MIDL_INLINE [[gnu::always_inline]] inline

namespace {

constexpr int L = MIDL_LANES;

typedef float Vec __attribute__((vector_size(4 * L)));
typedef std::int32_t IVec __attribute__((vector_size(4 * L)));
// The same at any address and over any type.
typedef float UnalignedVec __attribute__((vector_size(4 * L), aligned(1), may_alias));
typedef std::int32_t UnalignedIVec __attribute__((vector_size(4 * L), aligned(1), may_alias));
typedef std::uint16_t UnalignedHalves __attribute__((vector_size(2 * L), aligned(1), may_alias));
typedef std::uint32_t UVec __attribute__((vector_size(4 * L)));

// bfloat16 as stored: the upper half of a float.
struct bf16 {
  std::uint16_t bits;
};

// value - 0 is value, also for -0, so nothing but a broadcast is left of it.
MIDL_INLINE Vec splat(float value) { return value - Vec{}; }
MIDL_INLINE IVec splat(std::int32_t value) { return value - IVec{}; }

MIDL_INLINE UVec splat(std::uint32_t value) { return value - UVec{}; }

// Two words that lie side by side, again and again: bits as they are.
template <class T>
MIDL_INLINE Vec splat_pair(const T* p) {
  typedef std::int64_t Pairs __attribute__((vector_size(4 * L)));
  std::int64_t pair;
  __builtin_memcpy(&pair, p, 8);
  return (Vec)(pair - Pairs{});
}

MIDL_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
MIDL_INLINE IVec load(const std::int32_t* p) { return *reinterpret_cast<const UnalignedIVec*>(p); }
MIDL_INLINE Vec load(const bf16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), UVec) << 16);
}
MIDL_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
MIDL_INLINE void store(std::int32_t* p, IVec v) { *reinterpret_cast<UnalignedIVec*>(p) = v; }

// Keep v in a register: compilers otherwise load an operand once per use, and loads are what limits these loops.
#if defined(__AVX512F__) || (defined(__AVX__) && MIDL_LANES <= 8) || (defined(__x86_64__) && MIDL_LANES <= 4)
#define MIDL_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__aarch64__) && MIDL_LANES <= 4
#define MIDL_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define MIDL_IN_REGISTER(v)
#endif

MIDL_INLINE float to_float(float value) { return value; }
MIDL_INLINE float to_float(bf16 value) { return __builtin_bit_cast(float, std::uint32_t(value.bits) << 16); }

// Two bfloat16 values side by side, the unit of dot-product instructions: a 32-bit word per lane, the first value in its
// lower half. Both widen to float32 by one operation each.
MIDL_INLINE UVec load_pairs(const bf16* p) { return (UVec)*reinterpret_cast<const UnalignedIVec*>(p); }
MIDL_INLINE Vec first_of_pairs(UVec pairs) { return (Vec)(pairs << 16); }
MIDL_INLINE Vec second_of_pairs(UVec pairs) { return (Vec)(pairs & 0xffff0000u); }
MIDL_INLINE std::uint32_t pair_at(const bf16* p) {
  std::uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

// sum + a.first * b.first + a.second * b.second; the instruction takes subnormal numbers for zero.
MIDL_INLINE Vec add_dot_pairs(Vec sum, UVec a, UVec b) {
#ifdef __AVX512BF16__
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += first_of_pairs(a) * first_of_pairs(b);
  return sum + second_of_pairs(a) * second_of_pairs(b);
#endif
}

// Whether bfloat16 rows are multiplied as they are, by dot products of pairs, or widened to float32 first. The build
// says so, since the code for the one can be compiled, for tests, where there is no instruction for it.
#ifdef MIDL_DOT_PAIRS
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif
// Whether they are multiplied by tile registers, see tiles.hpp.
#ifdef MIDL_TILES
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

// The first `count` < L elements, zeros behind them; nothing past them is read.
template <class T>
MIDL_INLINE Vec load_first(const T* p, std::int64_t count) {
  float lanes[L] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

// Round to nearest even, NaN stays NaN.
MIDL_INLINE bf16 to_bf16(float value) {
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{std::uint16_t((bits >> 16) | 0x40)};
  return bf16{std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// For short runs of unknown length, where memcpy would be a call or a slow string instruction.
MIDL_INLINE void copy_floats(const float* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

MIDL_INLINE void store_as(float* p, Vec v) { store(p, v); }
MIDL_INLINE void store_as(bf16* p, Vec v) {
#ifdef __AVX512BF16__
  // Takes subnormal numbers for zero, as the dot products do.
  *reinterpret_cast<UnalignedHalves*>(p) = (UnalignedHalves)_mm512_cvtneps_pbh((__m512)v);
#else
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const UVec quiet = (bits >> 16) | 0x40;
  const UVec is_nan = (UVec)((bits & 0x7fffffffu) > 0x7f800000u);
  *reinterpret_cast<UnalignedHalves*>(p) =
      __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), UnalignedHalves);
#endif
}
MIDL_INLINE void store_as(float* p, float value) { *p = value; }
MIDL_INLINE void store_as(bf16* p, float value) { *p = to_bf16(value); }

// Copy elements, widened where they are for float32.
template <class X, class E>
MIDL_INLINE void copy_elements(const X* from, std::int64_t count, E* to) {
  std::int64_t i = 0;
  if constexpr (sizeof(X) == 2 && sizeof(E) == 2) {
    for (; i + 2 * L <= count; i += 2 * L) *reinterpret_cast<UnalignedIVec*>(to + i) = (IVec)load_pairs(from + i);
    for (; i < count; ++i) to[i] = from[i];
  } else {
    for (; i + L <= count; i += L) store_as(to + i, load(from + i));
    for (; i < count; ++i) store_as(to + i, to_float(from[i]));
  }
}

}  // namespace
