// Products of input rows with panels of neurons: neurons on the lanes, rows addressed by pointer and never copied.
//
// A panel holds up to kPanelWidth neurons transposed: sub-panels of 2 L lanes, then one of L and a folded one, as far as
// the neurons reach. Each is stored (words, lanes): a word is one float of the depth, or two bfloat16 with zeros behind the
// depth. A folded one holds at most L / 2 neurons, two sums per neuron: (words / 2, L / 2, 2); bfloat16 only where there are
// dot products for it. Panels come packed from the caller or are packed here, slice by slice, into memory that stays in
// cache.
#pragma once

#include "dot.hpp"
#include "shuffle.hpp"

namespace {

constexpr int kPanelWidth = 32;
// Rows of a register tile against a sub-panel of V vectors. Registers would do for 14 of two vectors, but rows a multiple of 4 KiB
// apart share a set of the nearest cache, which holds 8 or 12 lines: on Zen 4 14 rows go at 75 % of the speed, 10 at 99 %.
constexpr int panel_rows(int vectors) { return L >= 16 ? (vectors == 2 ? 10 : 12) : (vectors == 2 ? 6 : 8); }
MIDL_INLINE std::int64_t lesser(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
MIDL_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }
MIDL_INLINE std::int64_t divide_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step; }

// Copy `width` elements, padded with zeros to a multiple of `step`.
template <class X, class E>
MIDL_INLINE void copy_columns(const X* from, std::int64_t width, std::int64_t step, E* to) {
  copy_elements(from, width, to);
  for (std::int64_t j = width; j < round_up(width, step); ++j) to[j] = E{};
}

// Neurons as the op gets them and, where the caller packed them, as a panel.
template <class W>
struct Neurons {
  const W* plain;         // (count, depth), row stride `stride`
  std::int64_t stride;
  const W* panel;         // or null
  int count;              // at most kPanelWidth
  const W* next = nullptr;  // the panel that this thread is likely to multiply next, or null
};

// Memory that a tile fetches into the cache while it computes, one line per word of its depth or less; or null.
struct Ahead {
  const char* from = nullptr;
  std::int64_t step = 0;  // bytes per word
  // What belongs to U words.
  template <int U>
  MIDL_INLINE void fetch() {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u, from += step)
      for (std::int64_t line = 0; line < step; line += 64) __builtin_prefetch(from + line, 0, 2);
  }
};

// Elements of the depth that lie side by side in a panel, one 32-bit word.
template <class P>
constexpr int kWord = 4 / sizeof(P);
// A packed panel's depth is a multiple of this, zeros behind the neurons': a word, or what a tile register takes.
template <class P>
constexpr int kPadding = kTiles && sizeof(P) == 2 ? 32 : kWord<P>;

// Whether a sub-panel with so many neurons, the last ones of a panel, is folded.
template <class P>
constexpr bool kFolds = (sizeof(P) == 4 || (kDotPairs && !kTiles)) && L > 2;
template <class P>
constexpr bool folds(std::int64_t neurons) {
  return kFolds<P> && neurons <= L / 2;
}
// Lanes that the next sub-panel takes up, L / 2 if it is folded, where so many neurons are left.
template <class P>
constexpr int sub_panel_lanes(std::int64_t left) {
  return folds<P>(left) ? L / 2 : left <= L || folds<P>(left - L) ? L : 2 * L;
}
// Those of a whole panel, which holds that many elements per element of the depth; at most the neurons' number rounded up to L.
template <class P>
constexpr std::int64_t panel_lanes(std::int64_t neurons) {
  std::int64_t lanes = 0;
  while (lanes < neurons) lanes += sub_panel_lanes<P>(neurons - lanes);
  return lanes;
}
// Neurons in sub-panels of 2 L lanes, at the beginning of a panel.
template <class P>
constexpr int wide_neurons(int neurons) {
  const int whole = neurons / (2 * L) * (2 * L);
  return whole < neurons && sub_panel_lanes<P>(neurons - whole) == 2 * L ? whole + 2 * L : whole;
}
template <class P>
constexpr bool has_folded(int neurons) {
  return panel_lanes<P>(neurons) % L != 0;
}
// Groups narrower than this would waste most lanes of a panel of their own, or more than a quarter of a folded one's.
template <class P>
constexpr std::int64_t kPanelWorthNeurons = kFolds<P> ? (3 * L + 7) / 8 : L / 2 + 1;

// `length` elements, `start` elements behind a row's pointer.
struct Segment {
  std::int64_t start, length;
};

// Words [i, i + L) of a neuron, bits as they are; float panels of bfloat16 neurons are widened.
template <class P, class W>
MIDL_INLINE Vec load_words(const W* w, std::int64_t i) {
  if constexpr (kWord<P> == 2)
    return (Vec)load_pairs(w + 2 * i);
  else
    return load(w + i);
}
template <class P, class W>
MIDL_INLINE void store_word(const W* w, std::int64_t i, std::int64_t depth, P* to) {
  if constexpr (kWord<P> == 2) {
    to[0] = w[2 * i];
    to[1] = 2 * i + 1 < depth ? w[2 * i + 1] : bf16{0};
  } else {
    to[0] = to_float(w[i]);
  }
}

// Room for a panel's depth, also where its last word is half of a folded one.
template <class P>
constexpr std::int64_t packed_depth(std::int64_t depth) {
  return round_up(depth, kPadding<P> > 4 ? kPadding<P> : 4);
}

// Write `lanes` neurons as (words of the depth, lanes), L / 2 of them folded; zeros past `count`.
template <class W, class P>
void pack_sub_panel(const W* w, std::int64_t stride, int count, int lanes, std::int64_t depth, P* panel) {
  constexpr int K = kWord<P>;
  const std::int64_t words = divide_up(depth, K), padded = round_up(depth, kPadding<P>) / K;
  if constexpr (kFolds<P>) {
    if (lanes == L / 2) {
      std::int64_t i = 0;
      for (; (i + L) * K <= depth; i += L) {
        Vec block[L / 2];
#pragma GCC unroll 16
        for (int j = 0; j < L / 2; ++j) block[j] = j < count ? load_words<P>(w + j * stride, i) : Vec{};
        transpose_pairs(block);
#pragma GCC unroll 16
        for (int j = 0; j < L / 2; ++j) store(reinterpret_cast<float*>(panel + (i / 2 + j) * L * K), block[j]);
      }
      for (; i < round_up(words, 2); ++i)
        for (int j = 0; j < L / 2; ++j) {
          P* to = panel + (i / 2 * L + 2 * j + i % 2) * K;
          if (j < count && i < words)
            store_word(w + j * stride, i, depth, to);
          else
            __builtin_memset(to, 0, 4);
        }
      return;
    }
  }
  for (int lane = 0; lane < lanes; lane += L) {
    P* target = panel + lane * K;
    std::int64_t i = 0;
    if (lane + L <= count) {
      for (; (i + L) * K <= depth; i += L) {
        Vec block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = load_words<P>(w + (lane + j) * stride, i);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(reinterpret_cast<float*>(target + (i + j) * lanes * K), block[j]);
      }
    }
    for (; i < padded; ++i)
      for (int j = 0; j < L; ++j) {
        P* to = target + (i * lanes + j) * K;
        if (lane + j < count && i < words)
          store_word(w + (lane + j) * stride, i, depth, to);
        else
          __builtin_memset(to, 0, 4);
      }
  }
}

// Pack a whole panel of `count` neurons: panel_lanes(count) * packed_depth(depth) elements.
template <class W, class P>
void pack_panel(const W* w, std::int64_t stride, int count, std::int64_t depth, P* panel) {
  const std::int64_t padded = round_up(depth, kPadding<P>);
  for (int first = 0, lanes; first < count; first += lanes) {
    lanes = sub_panel_lanes<P>(count - first);
    pack_sub_panel(w + first * stride, stride, int(lesser(count - first, lanes)), lanes, depth, panel + first * padded);
  }
}

// acc[r][v] += the word at depth i of row r . that of vector v, which lies at column(v); `whole` unless the depth ends
// within the word.
template <int R, int V, class A, class P, class Column>
MIDL_INLINE void add_word(Vec (&acc)[R][V], const A* const (&a)[R], std::int64_t i, bool whole, Column column) {
  if constexpr (sizeof(A) == 2) {
    UVec pairs[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) pairs[v] = load_pairs(column(v));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const UVec row = splat(whole ? pair_at(a[r] + i) : std::uint32_t(a[r][i].bits));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = add_dot_pairs(acc[r][v], row, pairs[v]);
    }
  } else {
    const auto add = [&](auto value_of, std::int64_t at) {
      Vec value[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) value[v] = value_of(column(v));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec row = splat(a[r][at]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] += row * value[v];
      }
    };
    if constexpr (kWord<P> == 1) {
      add([](const P* p) { return load(p); }, i);
    } else {
      // The rows go by twice: all widened columns at once would not fit into the registers.
      add([](const P* p) { return first_of_pairs(load_pairs(p)); }, i);
      if (whole) add([](const P* p) { return second_of_pairs(load_pairs(p)); }, i + 1);
    }
  }
}

// The same for U words at once, row by row: there are more rows than registers for their addresses, and so each is read
// once for U words. Every sum takes its words in the same order as there.
template <int U, int R, int V, class A, class Column>
MIDL_INLINE void add_words(Vec (&acc)[R][V], const A* const (&a)[R], std::int64_t i, Column column) {
  constexpr int K = kWord<A>;
  Vec value[U][V];
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) value[u][v] = load_words<A>(column(u, v), 0);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const A* row = a[r] + i;
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        if constexpr (K == 2)
          acc[r][v] = add_dot_pairs(acc[r][v], splat(pair_at(row + 2 * u)), (UVec)value[u][v]);
        else
          acc[r][v] += splat(row[u]) * value[u][v];
      }
    }
  }
}

// out[r] (+)= rows[r][start .. start + depth) . V vectors of neurons, word i of vector v at column(i, v); without
// `accumulate` it starts from `bias` (or 0).
template <int R, int V, class P, class A, class Column>
MIDL_INLINE void multiply_tile(const A* const* rows, std::int64_t start, std::int64_t depth, const float* bias,
                               float* out, std::int64_t ldo, bool accumulate, Ahead ahead, Column column) {
  Vec acc[R][V];
  const A* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r] + start;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(out + r * ldo + v * L) : bias ? load(bias + v * L) : Vec{};
  }
  constexpr int K = kWord<P>;
  std::int64_t i = 0;
  if constexpr (L >= 16 && sizeof(A) == sizeof(P)) {
    constexpr int U = V == 1 ? 4 : 2;
    const auto add = [&] { add_words<U>(acc, a, i, [&](int u, int v) { return column(i + u * K, v); }); };
    if (ahead.from) {
      for (; i + U * K <= depth; i += U * K) {
        ahead.fetch<U>();
        add();
      }
    } else {
      for (; i + U * K <= depth; i += U * K) add();
    }
  }
  for (; i + K <= depth; i += K, ahead.from += ahead.step) {
    if (ahead.from) __builtin_prefetch(ahead.from, 0, 2);
    add_word<R, V, A, P>(acc, a, i, true, [&](int v) { return column(i, v); });
  }
  if (K > 1 && i < depth) add_word<R, V, A, P>(acc, a, i, false, [&](int v) { return column(i, v); });
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * L, acc[r][v]);
  }
}

template <int R, int V, class A, class P>
[[gnu::noinline]] void panel_tile(const A* const* rows, std::int64_t start, const P* panel, std::int64_t depth,
                                  const float* bias, float* out, std::int64_t ldo, bool accumulate, Ahead ahead) {
  multiply_tile<R, V, P>(rows, start, depth, bias, out, ldo, accumulate, ahead,
                         [panel](std::int64_t i, int v) { return panel + i * (V * L) + v * (L * kWord<P>); });
}

// A tile of m <= R rows.
template <int V, int R = panel_rows(V), class A, class P>
void panel_rows_tile(std::int64_t m, const A* const* rows, std::int64_t start, const P* panel, std::int64_t depth,
                     const float* bias, float* out, std::int64_t ldo, bool accumulate, Ahead ahead = {}) {
  if (m == R) return panel_tile<R, V>(rows, start, panel, depth, bias, out, ldo, accumulate, ahead);
  if constexpr (R > 1) panel_rows_tile<V, R - 1>(m, rows, start, panel, depth, bias, out, ldo, accumulate, ahead);
}

// sum + row . column, word by word.
template <class E>
MIDL_INLINE Vec add_product(Vec sum, Vec row, Vec column) {
  if constexpr (sizeof(E) == 2)
    return add_dot_pairs(sum, (UVec)row, (UVec)column);
  else
    return sum + row * column;
}

// acc[r] += the word at depth i of row r, which the depth may end within, times that half of a folded word which holds it.
template <bool Second, int R, class E>
MIDL_INLINE void add_half(Vec (&acc)[R], const E* const (&a)[R], std::int64_t i, std::int64_t depth, const E* word) {
  constexpr std::uint64_t kHalf = Second ? 0xffffffff00000000u : 0x00000000ffffffffu;
  typedef std::uint64_t Pairs __attribute__((vector_size(4 * L)));
  const Vec half = (Vec)((Pairs)load_words<E>(word, 0) & kHalf);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vec row;
    if constexpr (sizeof(E) == 2)
      row = (Vec)splat(i + 2 <= depth ? pair_at(a[r] + i) : std::uint32_t(a[r][i].bits));
    else
      row = splat(a[r][i]);
    acc[r] = add_product<E>(acc[r], row, half);
  }
}

// out[r] (+)= the segments of rows[r] . a folded sub-panel, from its word at `panel` on; `second`: from that word's second
// half. Without `accumulate` it starts from `bias` (or 0).
template <int R, class E>
[[gnu::noinline]] void folded_tile(const E* const* rows, const Segment* segments, std::int64_t count, const E* panel,
                                   bool second, const float* bias, float* out, std::int64_t ldo, bool accumulate,
                                   Ahead ahead) {
  constexpr int K = kWord<E>;
  // Two sums in flight, or few rows would wait for the last product.
  Vec acc[R] = {}, other[R] = {};
  for (std::int64_t s = 0; s < count; ++s) {
    const E* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r] + segments[s].start;
    std::int64_t i = 0;
    const std::int64_t depth = segments[s].length;
    if (second && depth > 0) {
      add_half<true>(acc, a, i, depth, panel);
      i += K, panel += L * K, second = false;
    }
    // As in add_words: an address is read once for several words.
    constexpr int U = 4;
    for (; i + 2 * U * K <= depth; i += 2 * U * K, panel += U * L * K) {
      Vec column[U];
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u) column[u] = load_words<E>(panel + u * L * K, 0);
      if (ahead.from) {
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u, ahead.from += 2 * ahead.step) __builtin_prefetch(ahead.from, 0, 2);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const E* row = a[r] + i;
#pragma GCC unroll 16
        for (int u = 0; u < U; u += 2) {
          acc[r] = add_product<E>(acc[r], splat_pair(row + 2 * K * u), column[u]);
          other[r] = add_product<E>(other[r], splat_pair(row + 2 * K * (u + 1)), column[u + 1]);
        }
      }
    }
    for (; i + 2 * K <= depth; i += 2 * K, panel += L * K) {
      const Vec column = load_words<E>(panel, 0);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r] = add_product<E>(acc[r], splat_pair(a[r] + i), column);
    }
    if (i < depth) {
      add_half<false>(acc, a, i, depth, panel);
      i += K, second = true;
    }
    if (i < depth) {
      add_half<true>(acc, a, i, depth, panel);
      panel += L * K, second = false;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const Vec both = acc[r] + other[r];
    const Vec sum = take_alternate<false>(both, both) + take_alternate<true>(both, both);
    float* to = out + r * ldo;
    store(to, accumulate ? load(to) + sum : bias ? load(bias) + sum : sum);
  }
}

// A tile of m <= panel_rows(1) rows.
template <int R = panel_rows(1), class... Args>
void folded_rows(std::int64_t m, Args... args) {
  if (m == R) return folded_tile<R>(args...);
  if constexpr (R > 1) folded_rows<R - 1>(m, args...);
}

// Two sub-panels at once for few rows: twice the accumulators in flight and two streams from memory.
template <int R, class A, class P>
[[gnu::noinline]] void panel_pair(const A* const* rows, std::int64_t start, const P* left, const P* right,
                                  std::int64_t depth, const float* bias, float* out, std::int64_t ldo,
                                  bool accumulate) {
  multiply_tile<R, 4, P>(rows, start, depth, bias, out, ldo, accumulate, Ahead{}, [left, right](std::int64_t i, int v) {
    return (v < 2 ? left : right) + i * (2 * L) + v % 2 * (L * kWord<P>);
  });
}

// Bytes ahead of a single tile.
constexpr std::int64_t kSingleTileAhead = 4096;

// What tile `tile` of `tiles` fetches while it goes over a slice of a sub-panel: `length` deep from depth `at` of the `lanes`
// that begin `column` elements into their panel. A single tile waits for memory: it fetches what comes later in the same
// panel, and behind it. Several share what comes after the slice, at depth `next_at` of the panel `next`; without one, nobody has
// fetched this slice either, and the first of them does what a single one does.
template <class P>
Ahead fetch_ahead(const P* panel, const P* next, std::int64_t column, int lanes, std::int64_t at, std::int64_t next_at,
                  std::int64_t length, std::int64_t tile, std::int64_t tiles) {
  if (tiles < 2 || (!next && tile == 0))
    return {reinterpret_cast<const char*>(panel + column + at * lanes) + kSingleTileAhead, 4 * lanes};
  if (!next) return {};
  const std::int64_t step = divide_up(4 * lanes, tiles);
  return {reinterpret_cast<const char*>(next + column + next_at * lanes) + tile * step * (length / kWord<P>), step};
}

// panel_rows_tile for a single tile and the end of its sub-panel: what it fetches behind that is the beginning of `next`.
template <int V, class A, class P>
void panel_rows_to_next(std::int64_t m, const A* const* rows, std::int64_t start, const P* panel, std::int64_t depth,
                        const float* bias, float* out, std::int64_t ldo, bool accumulate, const P* next) {
  constexpr std::int64_t kStep = 4 * V * L, kBehind = kSingleTileAhead / kStep * kWord<P>;
  const std::int64_t head = depth > kBehind ? (depth - kBehind) / kWord<P> * kWord<P> : 0;
  if (head)
    panel_rows_tile<V>(m, rows, start, panel, head, bias, out, ldo, accumulate,
                       Ahead{reinterpret_cast<const char*>(panel) + kSingleTileAhead, kStep});
  panel_rows_tile<V>(m, rows, start + head, panel + head * (V * L), depth - head, bias, out, ldo, accumulate || head,
                     Ahead{reinterpret_cast<const char*>(next), kStep});
}

// out (m x round_up(count, L)) (+)= rows[start ..) . panel over one slice of the depth. The sub-panels are `panel_depth`
// deep and the slice begins at depth `offset` in them, where a word begins. Where several tiles of rows go over the
// slice, they meanwhile fetch the one that comes after it: at depth `next_offset` of the panel `next`, or null.
template <class A, class P>
void panel_slice(const A* const* rows, std::int64_t m, const P* panel, std::int64_t panel_depth,
                 std::int64_t offset, int count, std::int64_t start, std::int64_t depth, const float* bias, float* out,
                 std::int64_t ldo, bool accumulate, const P* next = nullptr, std::int64_t next_offset = 0) {
  panel_depth = round_up(panel_depth, kPadding<P>);
  const int wide = wide_neurons<P>(count);
  constexpr int R2 = panel_rows(2), R1 = panel_rows(1);
  const auto fetch = [&](int column, int lanes, std::int64_t tile, std::int64_t tiles) {
    return fetch_ahead(panel, next, column * panel_depth, lanes, offset, next_offset, depth, tile, tiles);
  };
  // Whether a sub-panel whose lanes end so is the end of the panel, and something else is next.
  const auto to_next = [&](int end, std::int64_t tiles) { return tiles == 1 && end >= count && next && next != panel; };
  const std::int64_t tiles = divide_up(m, R2);
  const std::int64_t even = divide_up(m, tiles ? tiles : 1);
  for (std::int64_t r = 0; r < m; r += even) {
    const std::int64_t tile = lesser(m - r, even);
    for (int c = 0; c < wide; c += 2 * L) {
      const P* sub = panel + c * panel_depth + offset * (2 * L);
      const float* from = bias ? bias + c : nullptr;
      float* to = out + r * ldo + c;
      if (tile <= 2 && c + 4 * L <= wide) {
        const P* right = sub + 2 * L * panel_depth;
        if (tile == 1)
          panel_pair<1>(rows + r, start, sub, right, depth, from, to, ldo, accumulate);
        else
          panel_pair<2>(rows + r, start, sub, right, depth, from, to, ldo, accumulate);
        c += 2 * L;
      } else if (to_next(c + 2 * L, tiles)) {
        panel_rows_to_next<2>(tile, rows + r, start, sub, depth, from, to, ldo, accumulate, next);
      } else {
        panel_rows_tile<2>(tile, rows + r, start, sub, depth, from, to, ldo, accumulate, fetch(c, 2 * L, r / even, tiles));
      }
    }
  }
  if (wide >= count) return;
  const std::int64_t narrow_tiles = divide_up(m, R1), narrow_even = divide_up(m, narrow_tiles ? narrow_tiles : 1);
  int c = wide;
  if (sub_panel_lanes<P>(count - c) == L) {
    for (std::int64_t r = 0; r < m; r += narrow_even) {
      const std::int64_t tile = lesser(m - r, narrow_even);
      const P* sub = panel + c * panel_depth + offset * L;
      const float* from = bias ? bias + c : nullptr;
      float* to = out + r * ldo + c;
      if (to_next(c + L, narrow_tiles))
        panel_rows_to_next<1>(tile, rows + r, start, sub, depth, from, to, ldo, accumulate, next);
      else
        panel_rows_tile<1>(tile, rows + r, start, sub, depth, from, to, ldo, accumulate, fetch(c, L, r / narrow_even, narrow_tiles));
    }
    c += L;
  }
  if constexpr (sizeof(A) == sizeof(P) && kFolds<P>) {
    const Segment segment{start, depth};
    for (std::int64_t r = 0; c < count && r < m; r += narrow_even)
      folded_rows(lesser(m - r, narrow_even), rows + r, &segment, std::int64_t(1), panel + c * panel_depth + offset / 2 * L,
                  false, bias ? bias + c : nullptr, out + r * ldo + c, ldo, accumulate,
                  fetch(c, L / 2, r / narrow_even, narrow_tiles));
  }
}

// A slice of a panel, as pack_panel would write it from float neurons.
inline void widen_slice(const bf16* panel, std::int64_t panel_depth, std::int64_t offset, int count, std::int64_t depth,
                        float* slice) {
  panel_depth = round_up(panel_depth, kPadding<bf16>);
  // Where the lanes of the panel's sub-panel `begin` lie that begin with neuron `first`.
  int begin = 0;
  for (int first = 0, lanes; first < count; first += lanes) {
    lanes = sub_panel_lanes<float>(count - first);
    int source_lanes = sub_panel_lanes<bf16>(count - begin);
    if (begin + source_lanes <= first) begin += source_lanes, source_lanes = sub_panel_lanes<bf16>(count - begin);
    const bf16* from = panel + begin * panel_depth + offset * source_lanes + 2 * (first - begin);
    float* to = slice + first * depth;
    if (lanes < L) {
      // Pairs lie side by side in a word and in a folded one; where the panel is folded as well, words of even number lie in
      // its even lanes.
      for (std::int64_t i = 0; i < depth; i += 2) {
        const bf16* pairs = from + i * source_lanes;
        bf16 even[L];
        if constexpr (kFolds<bf16>) {
          pairs = even;
          for (int j = 0; j < L / 2; ++j)
            __builtin_memcpy(even + 2 * j, from + i / 4 * (2 * L) + (2 * j + i / 2 % 2) * 2, 4);
        }
        store(to + i / 2 * L, load(pairs));
      }
      return;
    }
    for (std::int64_t i = 0; i < depth; i += 2)
      for (int lane = 0; lane < lanes; lane += L) {
        const UVec pairs = load_pairs(from + i * source_lanes + 2 * lane);
        store(to + i * lanes + lane, first_of_pairs(pairs));
        if (i + 1 < depth) store(to + (i + 1) * lanes + lane, second_of_pairs(pairs));
      }
  }
}

// Rows from which a bfloat16 panel is widened once rather than tile by tile.
constexpr std::int64_t kRowsThatWiden = 2 * panel_rows(2) + 1;

// out (m x count) = rows (m x depth, by pointer) . neurons^T + bias (round_up(count, L) values, or null).
// The result has the same bits with and without a panel. Columns up to round_up(count, L) may be written. `slice` holds slice_floats() floats.
template <class A, class W>
void multiply_neurons(const A* const* rows, std::int64_t m, const Neurons<W>& neurons, std::int64_t depth,
                      const float* bias, float* slice, float* out, std::int64_t ldo) {
  // Two tiles of rows wait for memory: they share a slice in the nearest cache. Every sum is the same for any slices.
  const std::int64_t block = sizeof(A) == 4 && m > panel_rows(2) && m <= 2 * panel_rows(2) ? kDepthBlock / 4 : kDepthBlock;
  const std::int64_t step = round_up(divide_up(depth, divide_up(depth, block)), L);
  [[maybe_unused]] const bool folded = has_folded<float>(neurons.count);
  for (std::int64_t start = 0; start < depth; start += step) {
    const std::int64_t length = lesser(step, depth - start);
    bool widened = false;
    if constexpr (sizeof(A) != sizeof(W)) {
      widened = neurons.panel && (m >= kRowsThatWiden || folded);
      if (widened) widen_slice(neurons.panel, depth, start, neurons.count, length, slice);
    }
    if (neurons.panel && !widened) {
      const bool last = start + step >= depth;
      panel_slice(rows, m, neurons.panel, depth, start, neurons.count, start, length, bias, out, ldo, start > 0,
                  last ? neurons.next : neurons.panel, last ? 0 : start + step);
    } else {
      // Of the rows' type.
      A* panel = reinterpret_cast<A*>(slice);
      if (!widened) pack_panel(neurons.plain + start, neurons.stride, neurons.count, length, panel);
      panel_slice(rows, m, panel, length, 0, neurons.count, start, length, bias, out, ldo, start > 0);
    }
  }
}

constexpr std::int64_t slice_floats() { return kPanelWidth * (kDepthBlock + L); }

}  // namespace
