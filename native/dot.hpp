// Dot products of input rows with neuron rows, both contiguous along the depth: no packing, no copies.
//
// A register tile takes R rows, each addressed by its own pointer, against C neurons; a vector of partial sums per pair is
// reduced at the end. A row's result does not depend on the tile it falls into.
#pragma once

#include "shuffle.hpp"

namespace {

// Rows of a tile, and the columns that go with R rows: accumulators, C weights and one input fill the register file.
constexpr int kTileRows = 6;
constexpr int tile_columns(int rows) {
  return L >= 16 ? (rows <= 3 ? 8 : 4) : (rows == 1 ? 8 : rows <= 3 ? 4 : 2);
}

// Depth of a pass: the tile's input rows stay in the first cache level, 32 neurons in the second.
constexpr std::int64_t kDepthBlock = 1024;

// acc[r][c] += the products of bfloat16 a[r] and b[c] over elements [i, i + 2 L): a pair in each lane.
template <int R, int C, class W>
MIDL_INLINE void add_pairs(Vec (&acc)[R][C], const bf16* const (&a)[R], const W* const (&b)[C], std::int64_t i) {
  if constexpr (sizeof(W) == 2) {
    UVec column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load_pairs(b[c] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const UVec row = load_pairs(a[r] + i);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r][c] = add_dot_pairs(acc[r][c], row, column[c]);
    }
  } else {
    Vec first[C], second[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const Vec low = load(b[c] + i), high = load(b[c] + i + L);
      first[c] = take_alternate<false>(low, high);
      second[c] = take_alternate<true>(low, high);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const UVec row = load_pairs(a[r] + i);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        acc[r][c] += first_of_pairs(row) * first[c];
        acc[r][c] += second_of_pairs(row) * second[c];
      }
    }
  }
}

// out[r][c] (+)= sum over i < depth of rows[r][start + i] * w[c][start + i]
template <int R, int C, class A, class W>
MIDL_INLINE void dot_tile(const A* const* rows, const W* w, std::int64_t ldw, std::int64_t start,
                          std::int64_t depth, float* out, std::int64_t ldo, bool accumulate) {
  constexpr int kSums = (R * C + L - 1) / L;
  Vec acc[R][C] = {};
  const A* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = rows[r] + start;
  const W* b[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) b[c] = w + c * ldw + start;
  std::int64_t i = 0;
  if constexpr (sizeof(A) == 2)
    for (; i + 2 * L <= depth; i += 2 * L) add_pairs(acc, a, b, i);
  for (; i + L <= depth; i += L) {
    Vec column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load(b[c] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec row = load(a[r] + i);
      MIDL_IN_REGISTER(row);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r][c] += row * column[c];
    }
  }
  if (i < depth) {
    Vec column[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) column[c] = load_first(b[c] + i, depth - i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = load_first(a[r] + i, depth - i);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r][c] += row * column[c];
    }
  }
  float sums[kSums * L];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) {
    Vec part[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) part[j] = s * L + j < R * C ? acc[(s * L + j) / C % R][(s * L + j) % C] : Vec{};
    store(sums + s * L, sum_lanes(part));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    float* o = out + r * ldo;
    if (accumulate) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) o[c] += sums[r * C + c];
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) o[c] = sums[r * C + c];
    }
  }
}

template <int R, int C, class A, class W>
MIDL_INLINE void dot_columns(const A* const* rows, const W* w, std::int64_t ldw, int neurons, std::int64_t start,
                             std::int64_t depth, float* out, std::int64_t ldo, bool accumulate) {
  int c = 0;
  for (; c + C <= neurons; c += C) dot_tile<R, C>(rows, w + c * ldw, ldw, start, depth, out + c, ldo, accumulate);
  if constexpr (C > 1) {
    if (c < neurons)
      dot_columns<R, C / 2>(rows, w + c * ldw, ldw, neurons - c, start, depth, out + c, ldo, accumulate);
  }
}

template <int R, class A, class W>
[[gnu::noinline]] void dot_rows(const A* const* rows, const W* w, std::int64_t ldw, int neurons,
                                std::int64_t start, std::int64_t depth, float* out, std::int64_t ldo,
                                bool accumulate) {
  dot_columns<R, tile_columns(R)>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
}

// The next tile's rows begin where no stride leads to: fetched ahead, until the hardware sees their streams.
template <class A>
MIDL_INLINE void fetch_next_tile(const A* const* rows, std::int64_t m, std::int64_t start) {
  constexpr int kBytes = 256;
  for (std::int64_t r = kTileRows; r < m && r < 2 * kTileRows; ++r)
#pragma GCC unroll 4
    for (int byte = 0; byte < kBytes; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + start) + byte);
}

// out[m][n] (+)= rows . w^T over one range of the depth.
template <class A, class W>
void dot_block(const A* const* rows, std::int64_t m, const W* w, std::int64_t ldw, int neurons,
               std::int64_t start, std::int64_t depth, float* out, std::int64_t ldo, bool accumulate) {
  for (; m >= kTileRows; m -= kTileRows, rows += kTileRows, out += kTileRows * ldo) {
    fetch_next_tile(rows, m, start);
    dot_rows<kTileRows>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
  }
  switch (m) {
    case 5: return dot_rows<5>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
    case 4: return dot_rows<4>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
    case 3: return dot_rows<3>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
    case 2: return dot_rows<2>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
    case 1: return dot_rows<1>(rows, w, ldw, neurons, start, depth, out, ldo, accumulate);
    default: return;
  }
}

}  // namespace
