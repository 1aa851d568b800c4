// Transposes and lane sums by butterflies of shuffles.
#pragma once

#include <utility>

#include "simd.hpp"

namespace {

// In every run of 2H lanes: the lower (upper) H lanes of a's run, then the lower (upper) H lanes of b's.
template <int H, bool Upper, std::size_t... I>
MIDL_INLINE Vec take_halves(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(
      a, b, (int(I) / (2 * H) * (2 * H) + int(I) % H + (Upper ? H : 0) + (int(I) % (2 * H) < H ? 0 : L))...);
}
template <int H>
MIDL_INLINE Vec lower_halves(Vec a, Vec b) {
  return take_halves<H, false>(a, b, std::make_index_sequence<L>{});
}
template <int H>
MIDL_INLINE Vec upper_halves(Vec a, Vec b) {
  return take_halves<H, true>(a, b, std::make_index_sequence<L>{});
}

// Every second of the 2 L lanes of a and b, the first of them or the second.
template <bool Second, std::size_t... I>
MIDL_INLINE Vec take_alternate(Vec a, Vec b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * int(I) + Second)...);
}
template <bool Second>
MIDL_INLINE Vec take_alternate(Vec a, Vec b) {
  return take_alternate<Second>(a, b, std::make_index_sequence<L>{});
}

// Lane i of the result is the sum of the lanes of v[i]; v is used up.
template <int H = L / 2>
MIDL_INLINE Vec sum_lanes(Vec (&v)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i) v[i] = lower_halves<H>(v[i], v[i + H]) + upper_halves<H>(v[i], v[i + H]);
  if constexpr (H > 1) return sum_lanes<H / 2>(v);
  return v[0];
}

// Lane j of v[i] and lane i of v[j] change places.
template <int H = L / 2>
MIDL_INLINE void transpose(Vec (&v)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & H) continue;
    const Vec a = v[i], b = v[i + H];
    v[i] = lower_halves<H>(a, b);
    v[i + H] = upper_halves<H>(a, b);
  }
  if constexpr (H > 1) transpose<H / 2>(v);
}

// Words of an element of a and one of b each: of the lower half of their 2 L elements, or of the upper.
typedef std::uint16_t Halves __attribute__((vector_size(4 * L)));
template <bool Upper, std::size_t... I>
MIDL_INLINE UVec join_halves(Halves a, Halves b, std::index_sequence<I...>) {
  return (UVec)__builtin_shufflevector(a, b, (int(I) / 2 + (Upper ? L : 0) + (I % 2 ? 2 * L : 0))...);
}
template <bool Upper>
MIDL_INLINE UVec join_halves(Halves a, Halves b) {
  return join_halves<Upper>(a, b, std::make_index_sequence<2 * L>{});
}

// Lanes 2 j and 2 j + 1 of v[i] and lanes 2 i and 2 i + 1 of v[j] change places.
template <int H = L / 2>
MIDL_INLINE void transpose_pairs(Vec (&v)[L / 2]) {
  if constexpr (H >= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      if (i & (H / 2)) continue;
      const Vec a = v[i], b = v[i + H / 2];
      v[i] = lower_halves<H>(a, b);
      v[i + H / 2] = upper_halves<H>(a, b);
    }
    transpose_pairs<H / 2>(v);
  }
}

}  // namespace
