// Products of input rows with panels of neurons: neurons on the lanes, rows addressed by pointer and never copied.
//
// A panel holds up to kPanelWidth neurons transposed: sub-panels of 2 L lanes (the last may have L), each stored
// (depth, lanes). Panels come packed from the caller or are packed here, slice by slice, into memory that stays in cache.
#pragma once

#include "dot.hpp"

namespace {

constexpr int kPanelWidth = 32;
// Rows of a register tile against a sub-panel of V vectors.
constexpr int panel_rows(int vectors) { return L >= 16 ? (vectors == 2 ? 10 : 12) : (vectors == 2 ? 6 : 8); }
// Groups narrower than this would waste most lanes of a panel of their own.
constexpr std::int64_t kPanelWorthNeurons = L / 2 + 1;

MIDL_INLINE std::int64_t lesser(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
MIDL_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }
MIDL_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step; }

// Neurons as the op gets them and, where the caller packed them, as a panel.
template <class W>
struct Neurons {
  const W* plain;         // (count, depth), row stride `stride`
  std::int64_t stride;
  const W* panel;         // or null
  int count;              // at most kPanelWidth
};

// Write neurons [first, first + lanes) over depth [start, start + depth) as (depth, lanes); zeros past `count`.
template <class W, class P>
void pack_sub_panel(const W* w, std::int64_t stride, int count, int lanes, std::int64_t depth, P* panel) {
  for (int lane = 0; lane < lanes; lane += L) {
    P* target = panel + lane;
    std::int64_t i = 0;
    if (lane + L <= count) {
      for (; i + L <= depth; i += L) {
        Vec block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = load(w + (lane + j) * stride + i);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store_as(target + (i + j) * lanes, block[j]);
      }
    }
    for (; i < depth; ++i)
      for (int j = 0; j < L; ++j)
        store_as(target + i * lanes + j, lane + j < count ? to_float(w[(lane + j) * stride + i]) : 0.0f);
  }
}

// Pack a whole panel of `count` neurons: round_up(count, L) * depth elements.
template <class W, class P>
void pack_panel(const W* w, std::int64_t stride, int count, std::int64_t depth, P* panel) {
  for (int first = 0; first < count; first += 2 * L) {
    const int lanes = int(lesser(round_up(count - first, L), 2 * L));
    pack_sub_panel(w + first * stride, stride, int(lesser(count - first, lanes)), lanes, depth, panel + first * depth);
  }
}

// out[r][0 .. V L) (+)= rows[r][start ..) . panel slice; without `accumulate` it starts from `bias` (or 0).
template <int R, int V, class P>
[[gnu::noinline]] void panel_tile(const float* const* rows, std::int64_t start, const P* panel, std::int64_t depth,
                                  const float* bias, float* out, std::int64_t ldo, bool accumulate) {
  Vec acc[R][V];
  const float* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r] + start;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(out + r * ldo + v * L) : bias ? load(bias + v * L) : Vec{};
  }
  for (std::int64_t i = 0; i < depth; ++i) {
    Vec column[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) column[v] = load(panel + (i * V + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = splat(a[r][i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] += row * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * L, acc[r][v]);
  }
}

template <int R, int V, class P>
void panel_remainder(std::int64_t m, const float* const* rows, std::int64_t start, const P* panel, std::int64_t depth,
                     const float* bias, float* out, std::int64_t ldo, bool accumulate) {
  if (m == R) return panel_tile<R, V>(rows, start, panel, depth, bias, out, ldo, accumulate);
  if constexpr (R > 1) panel_remainder<R - 1, V>(m, rows, start, panel, depth, bias, out, ldo, accumulate);
}

// A tile of m <= panel_rows(V) rows.
template <int V, class P>
MIDL_INLINE void panel_rows_tile(std::int64_t m, const float* const* rows, std::int64_t start, const P* panel,
                                 std::int64_t depth, const float* bias, float* out, std::int64_t ldo,
                                 bool accumulate) {
  constexpr int R = panel_rows(V);
  if (m == R) return panel_tile<R, V>(rows, start, panel, depth, bias, out, ldo, accumulate);
  panel_remainder<R - 1, V>(m, rows, start, panel, depth, bias, out, ldo, accumulate);
}

// Two sub-panels at once for few rows: twice the accumulators in flight and two streams from memory.
template <int R, class P>
[[gnu::noinline]] void panel_pair(const float* const* rows, std::int64_t start, const P* left, const P* right,
                                  std::int64_t depth, const float* bias, float* out, std::int64_t ldo,
                                  bool accumulate) {
  Vec acc[R][4];
  const float* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r] + start;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = accumulate ? load(out + r * ldo + v * L) : bias ? load(bias + v * L) : Vec{};
  }
  for (std::int64_t i = 0; i < depth; ++i) {
    const Vec column[4] = {load(left + i * 2 * L), load(left + i * 2 * L + L), load(right + i * 2 * L),
                           load(right + i * 2 * L + L)};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = splat(a[r][i]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[r][v] += row * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(out + r * ldo + v * L, acc[r][v]);
  }
}

// out (m x round_up(count, L)) (+)= rows[start ..) . panel over one slice of the depth. The sub-panels are `panel_depth`
// deep and the slice begins at depth `offset` in them.
template <class P>
void panel_slice(const float* const* rows, std::int64_t m, const P* panel, std::int64_t panel_depth,
                 std::int64_t offset, int count, std::int64_t start, std::int64_t depth, const float* bias, float* out,
                 std::int64_t ldo, bool accumulate) {
  const int whole = count / (2 * L) * (2 * L), wide = count - whole > L ? whole + 2 * L : whole;
  constexpr int R2 = panel_rows(2), R1 = panel_rows(1);
  for (std::int64_t r = 0; r < m; r += R2) {
    const std::int64_t tile = lesser(m - r, R2);
    for (int c = 0; c < wide; c += 2 * L) {
      const P* sub = panel + c * panel_depth + offset * (2 * L);
      const float* from = bias ? bias + c : nullptr;
      float* to = out + r * ldo + c;
      if (tile <= 2 && c + 4 * L <= wide) {
        const P* next = sub + 2 * L * panel_depth;
        if (tile == 1)
          panel_pair<1>(rows + r, start, sub, next, depth, from, to, ldo, accumulate);
        else
          panel_pair<2>(rows + r, start, sub, next, depth, from, to, ldo, accumulate);
        c += 2 * L;
      } else {
        panel_rows_tile<2>(tile, rows + r, start, sub, depth, from, to, ldo, accumulate);
      }
    }
  }
  if (wide >= count) return;
  for (std::int64_t r = 0; r < m; r += R1)
    panel_rows_tile<1>(lesser(m - r, R1), rows + r, start, panel + wide * panel_depth + offset * L, depth,
                       bias ? bias + wide : nullptr, out + r * ldo + wide, ldo, accumulate);
}

// out (m x count) = rows (m x depth, by pointer) . neurons^T + bias (round_up(count, L) values, or null).
// The result has the same bits with and without a panel. Columns up to round_up(count, L) may be written. `slice` holds slice_floats() floats.
template <class W>
void multiply_neurons(const float* const* rows, std::int64_t m, const Neurons<W>& neurons, std::int64_t depth,
                      const float* bias, float* slice, float* out, std::int64_t ldo) {
  const std::int64_t step = round_up(divide_up(depth, divide_up(depth, kDepthBlock)), L);
  for (std::int64_t start = 0; start < depth; start += step) {
    const std::int64_t length = lesser(step, depth - start);
    if (neurons.panel) {
      panel_slice(rows, m, neurons.panel, depth, start, neurons.count, start, length, bias, out, ldo, start > 0);
    } else {
      pack_panel(neurons.plain + start, neurons.stride, neurons.count, length, slice);
      panel_slice(rows, m, slice, length, 0, neurons.count, start, length, bias, out, ldo, start > 0);
    }
  }
}

constexpr std::int64_t slice_floats() { return kPanelWidth * (kDepthBlock + L); }

}  // namespace
