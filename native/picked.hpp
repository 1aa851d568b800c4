// Dot products of many rows with those of a few neurons that each row picked.
//
// Slices of the neurons lie side by side in the nearest cache and that of a row in registers, so that a multiply-add takes one
// load. Every pick keeps half a vector of partial sums from slice to slice, whose lanes are added up at the end; it does
// not depend on the other rows and picks.
#pragma once

#include "panel.hpp"

namespace {

// Whether vectors are worth adding up for each pick, and there are no tile registers, with which all neurons take less time.
template <class T>
constexpr bool kPicks = L >= 8 && !(kTiles && sizeof(T) == 2);
// Fewer picks of a neuron, on average, don't repay its copy.
constexpr double kPicksWorthCopy = 3;
// Time of a multiply-add, that of one of all neurons by panels being 1, and of a pick, in words of the depth.
constexpr double kPickCost = 1.5, kPickWords = 80;

// Whether picking takes less time than dot products row by row.
template <class T>
MIDL_INLINE bool enough_picks(std::int64_t rows, std::int64_t groups, std::int64_t selected) {
  return kPicks<T> && double(rows) * double(selected) >= kPicksWorthCopy * double(groups);
}
// Whether many rows' picking does than all neurons by panels.
template <class T>
MIDL_INLINE bool few_picks(std::int64_t depth, std::int64_t groups, std::int64_t selected) {
  return double(selected) * (kPickCost * double(depth) + kPickWords * kWord<T>) < double(groups) * double(depth);
}

// Vectors of a row in registers; kPanelWidth neurons as deep fill three quarters of a cache of 32 KiB.
constexpr int kPickVectors = 12;
// Rows whose partial sums are kept at once.
constexpr std::int64_t kPickedAtOnce = 128;
constexpr std::int64_t kPickedSums = (kPickedAtOnce * kPanelWidth + L) * (L / 2);

typedef float HalfVec __attribute__((vector_size(2 * L)));
typedef float UnalignedHalfVec __attribute__((vector_size(2 * L), aligned(1), may_alias));

template <std::size_t... I>
MIDL_INLINE HalfVec add_halves(Vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I)...) + __builtin_shufflevector(v, v, (int(I) + L / 2)...);
}

// The depth in slices of at most kPickVectors vectors of `lanes` elements.
struct Slices {
  std::int64_t depth, lanes, vectors, count;
  Slices(std::int64_t depth_, std::int64_t lanes_)
      : depth(depth_), lanes(lanes_), vectors(divide_up(depth, lanes)), count(divide_up(vectors, kPickVectors)) {}
  std::int64_t begin(std::int64_t i) const { return i < count ? vectors * i / count * lanes : depth; }
};

// Neurons' slices that are fetched into the cache meanwhile, or null.
struct NextSlice {
  const char* from = nullptr;
  std::int64_t stride = 0, bytes = 0;
  int neurons = 0;
  MIDL_INLINE void fetch(int neuron) const {
    const char* line = from + neuron * stride;
    for (const char* end = line + bytes; line < end; line += 64) __builtin_prefetch(line, 0, 2);
  }
};

// Lanes 0 and L / 2, 1 and L / 2 + 1, ...
template <std::size_t... I>
MIDL_INLINE Vec in_turn(Vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int(I) / 2 + int(I) % 2 * (L / 2))...);
}

// sums[..] (+)= partial sums of the rows' picks, in order, over a slice of N vectors, which ends `tail` elements into the
// last one. `neurons` are as long as the slice, zeros behind its end.
template <int N, class A>
[[gnu::noinline]] void picks_slice(const A* const* rows, const std::uint32_t* masks, std::int64_t m, std::int64_t start,
                                   std::int64_t tail, const A* neurons, float* sums, bool accumulate, NextSlice next) {
  constexpr int E = L * kWord<A>;
  int fetched = next.from ? 0 : next.neurons;
  std::int64_t due = 0;
  for (std::int64_t r = 0; r < m; ++r) {
    const A* row = rows[r] + start;
    Vec a[N];
#pragma GCC unroll 16
    for (int i = 0; i < N - 1; ++i) a[i] = load_words<A>(row + i * E, 0);
    if (tail == E) {
      a[N - 1] = load_words<A>(row + (N - 1) * E, 0);
    } else {
      A last[E] = {};
      for (std::int64_t i = 0; i < tail; ++i) last[i] = row[(N - 1) * E + i];
      a[N - 1] = load_words<A>(last, 0);
    }
    for (due += next.neurons; due >= m && fetched < next.neurons; due -= m) next.fetch(fetched++);
    for (std::uint32_t left = masks[r]; left; left &= left - 1, sums += L / 2) {
      const A* neuron = neurons + __builtin_ctz(left) * (N * E);
      // Two sums, or each product would wait for the one before.
      Vec even = {}, odd = {};
#pragma GCC unroll 16
      for (int i = 0; i < N; i += 2) {
        even = add_product<A>(even, a[i], load_words<A>(neuron + i * E, 0));
        if (i + 1 < N) odd = add_product<A>(odd, a[i + 1], load_words<A>(neuron + (i + 1) * E, 0));
      }
      const HalfVec sum = add_halves(even + odd, std::make_index_sequence<L / 2>{});
      auto& kept = *reinterpret_cast<UnalignedHalfVec*>(sums);
      kept = accumulate ? kept + sum : sum;
    }
  }
}

template <int N = kPickVectors, class... Args>
void picks_vectors(std::int64_t vectors, Args... args) {
  if (vectors == N) return picks_slice<N>(args...);
  if constexpr (N > 1) picks_vectors<N - 1>(vectors, args...);
}

// Place values, one after the other, where a row's mask has bits, zeros elsewhere.
MIDL_INLINE void place_values(const float* values, std::uint32_t mask, float* to) {
#ifdef __AVX512F__
  for (int v = 0; v < kPanelWidth; v += L, to += L, mask >>= L) {
    const __mmask16 part = __mmask16(mask);
    store(to, (Vec)_mm512_maskz_expand_ps(part, (__m512)load(values)));
    values += __builtin_popcount(part);
  }
#else
  for (int v = 0; v < kPanelWidth; v += L) store(to + v, Vec{});
  for (; mask; mask &= mask - 1) to[__builtin_ctz(mask)] = *values++;
#endif
}

// out[r][j] = rows[r] . neuron j for every j < `count` that bit j of masks[r] names, 0 elsewhere in the rows of `out`,
// kPanelWidth long. `slice` holds slice_floats() floats, `sums` kPickedSums. Meanwhile the first slice
// of the neurons at `after` is fetched, or null.
template <class A, class W>
void dot_picked(const A* const* rows, const std::uint32_t* masks, std::int64_t m, const W* w, std::int64_t ldw,
                int count, std::int64_t depth, float* slice, float* sums, float* out, const W* after = nullptr) {
  constexpr int E = L * kWord<A>;
  static_assert(kPanelWidth * kPickVectors * L <= slice_floats());
  const Slices slices(depth, E);
  A* neurons = reinterpret_cast<A*>(slice);
  for (std::int64_t first = 0; first < m; first += kPickedAtOnce, rows += kPickedAtOnce, masks += kPickedAtOnce, out += kPickedAtOnce * kPanelWidth) {
    const std::int64_t some = lesser(kPickedAtOnce, m - first);
    for (std::int64_t i = 0; i < slices.count; ++i) {
      const std::int64_t start = slices.begin(i), end = slices.begin(i + 1), length = end - start, vectors = divide_up(length, E);
      for (int j = 0; j < count; ++j) copy_columns(w + j * ldw + start, length, E, neurons + j * vectors * E);
      NextSlice next;
      constexpr std::int64_t kBytes = sizeof(W);
      if (end < depth)
        next = {reinterpret_cast<const char*>(w + end), ldw * kBytes, (slices.begin(i + 2) - end) * kBytes, count};
      else if (after && first + some == m)
        next = {reinterpret_cast<const char*>(after), ldw * kBytes, slices.begin(1) * kBytes, count};
      picks_vectors(vectors, rows, masks, some, start, length - (vectors - 1) * E, static_cast<const A*>(neurons), sums, i > 0, next);
    }
    std::int64_t total = 0;
    for (std::int64_t r = 0; r < some; ++r) total += __builtin_popcount(masks[r]);
    // The totals lie where sums have been read.
    for (std::int64_t i = 0; i < total; i += L) {
      Vec two[L];
#pragma GCC unroll 16
      for (int j = 0; j < L / 2; ++j) two[j] = load(sums + i * (L / 2) + j * L);
      store(sums + i, in_turn(sum_lanes<L / 4>(two), std::make_index_sequence<L>{}));
    }
    const float* totals = sums;
    for (std::int64_t r = 0; r < some; ++r, totals += __builtin_popcount(masks[r - 1])) place_values(totals, masks[r], out + r * kPanelWidth);
  }
}

}  // namespace
