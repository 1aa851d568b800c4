// Short products (depth about the rank): neurons on the lanes, weights transposed into a small panel on the fly.
//
// A dot product of depth 100 would spend as long on its lane sums as on its multiply-adds. The panel is of
// kPanelWidth neurons, stored (sub-panel, depth, 2 L), and serves every row of the call.
#pragma once

#include "dot.hpp"

namespace {

constexpr int kPanelWidth = 32;
constexpr int kSubWidth = 2 * L;
constexpr int kPanelRows = L >= 16 ? 10 : 6;
// Fewer rows than this don't pay for the transpose.
constexpr std::int64_t kPanelWorthRows = 6;

constexpr std::int64_t panel_floats(std::int64_t depth) { return depth * kPanelWidth; }

// panel[s][i][j] = w[s * 2L + j][i], zero where the neuron is past `neurons`.
template <class W>
void pack_panel(const W* w, std::int64_t ldw, int neurons, std::int64_t depth, float* panel) {
  for (int first = 0; first < kPanelWidth; first += L) {
    float* target = panel + first / kSubWidth * (kSubWidth * depth) + first % kSubWidth;
    std::int64_t i = 0;
    if (first + L <= neurons) {
      for (; i + L <= depth; i += L) {
        Vec block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = load(w + (first + j) * ldw + i);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(target + (i + j) * kSubWidth, block[j]);
      }
    }
    for (; i < depth; ++i)
      for (int j = 0; j < L; ++j)
        target[i * kSubWidth + j] = first + j < neurons ? to_float(w[(first + j) * ldw + i]) : 0.0f;
  }
}

template <int R>
MIDL_INLINE void panel_tile(const float* a, std::int64_t lda, const float* panel, std::int64_t depth,
                            const float* bias, float* out, std::int64_t ldo) {
  Vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][0] = load(bias), acc[r][1] = load(bias + L);
  for (std::int64_t i = 0; i < depth; ++i) {
    const Vec b0 = load(panel + i * kSubWidth), b1 = load(panel + i * kSubWidth + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec row = splat(a[r * lda + i]);
      acc[r][0] += row * b0;
      acc[r][1] += row * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(out + r * ldo, acc[r][0]), store(out + r * ldo + L, acc[r][1]);
}

template <int R>
void panel_remainder(std::int64_t m, const float* a, std::int64_t lda, const float* panel, std::int64_t depth,
                     const float* bias, float* out, std::int64_t ldo) {
  if (m == R) return panel_tile<R>(a, lda, panel, depth, bias, out, ldo);
  if constexpr (R > 1) panel_remainder<R - 1>(m, a, lda, panel, depth, bias, out, ldo);
}

// out (m x 32) = a (m x depth, stride lda) . panel + bias (32)
void multiply_panel(const float* a, std::int64_t lda, std::int64_t m, const float* panel, std::int64_t depth,
                    const float* bias, float* out, std::int64_t ldo) {
  for (int first = 0; first < kPanelWidth; first += kSubWidth) {
    const float* sub = panel + first * depth;
    std::int64_t r = 0;
    for (; r + kPanelRows <= m; r += kPanelRows)
      panel_tile<kPanelRows>(a + r * lda, lda, sub, depth, bias + first, out + r * ldo + first, ldo);
    if (r < m) panel_remainder<kPanelRows - 1>(m - r, a + r * lda, lda, sub, depth, bias + first, out + r * ldo + first, ldo);
  }
}

}  // namespace
