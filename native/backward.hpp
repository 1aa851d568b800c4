// Backward pass of the full path: work in proportion to the selected share, the same bits on every run and for any
// number of threads, since every output element is summed by one thread in a fixed order.
//
// The gate's gradient needs the sum over a group of grad_y * f. With u = grad_y . W of the group, which grad_x needs
// anyway, that sum is u . x: the full path is not computed a second time.
//
// E is the type of grad_y, x and weight: float32, or bfloat16 where there are dot products for it, whose words are two
// neighbouring neurons of a group (gradient of x) or two members of it (gradient of weight).
#pragma once

#include "forward.hpp"

namespace {

// A tile of sums: this many members or neurons by vectors of columns. Depths are multiples of 4 vectors more often than of 3.
constexpr int kOuterRows = L >= 16 ? 6 : 4, kOuterVectors = L >= 16 ? 4 : 3;
constexpr std::int64_t kOuterColumns = kOuterVectors * L;
static_assert(kOuterRows <= L);
// Columns of the depth whose slices of inputs and weights stay in cache.
constexpr std::int64_t kColumnBlock = L >= 16 ? 128 : 96;
static_assert(kColumnBlock % kOuterColumns == 0);
// Fixed shares of the depth, each with its own partial sums for the gate.
constexpr std::int64_t kDepthShares = 8;
constexpr std::int64_t kBackwardRows = 512;
// Narrower groups would leave most of a tile register empty.
constexpr std::int64_t kTileGroup = 8;
// Members whose shares of a gradient of weights are summed before the next ones: all they need stays in the nearest cache.
constexpr std::int64_t kMembersAtOnce = 64;

// Which rows selected which group: for each group its members, ascending. A member knows its place in `selected`.
struct Members {
  std::int64_t* first;   // (groups + 1)
  std::int32_t* row;     // (members)
  std::int32_t* slot;    // (members), block * k + i

  void fill(const midl::LinearBackward& c, const Blocks& blocks) const {
    for (std::int64_t g = 0; g <= c.groups; ++g) first[g] = 0;
    const auto for_each = [&](auto visit) {
      for (std::int64_t b = 0; b < blocks.count; ++b) {
        const std::int64_t begin = blocks.first_row(b), end = b + 1 == blocks.count ? c.rows : blocks.first_row(b + 1);
        for (std::int64_t i = b * c.selected_groups; i < (b + 1) * c.selected_groups; ++i)
          if (c.selected[i] >= 0) visit(c.selected[i], i, begin, end);
      }
    };
    for_each([&](std::int64_t g, std::int64_t, std::int64_t begin, std::int64_t end) { first[g + 1] += end - begin; });
    for (std::int64_t g = 0; g < c.groups; ++g) first[g + 1] += first[g];
    for_each([&](std::int64_t g, std::int64_t i, std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) {
        row[first[g]] = std::int32_t(r);
        slot[first[g]++] = std::int32_t(i);
      }
    });
    for (std::int64_t g = c.groups; g > 0; --g) first[g] = first[g - 1];
    first[0] = 0;
  }

  // The first member of [begin, end) at or behind `limit`.
  std::int64_t find_row(std::int64_t begin, std::int64_t end, std::int64_t limit) const {
    while (begin < end) {
      const std::int64_t middle = (begin + end) / 2;
      if (row[middle] < limit)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

template <class E>
struct BackwardPlan {
  const midl::LinearBackward& call;
  const E *grad_y, *x, *weight;
  E* grad_light;
  Blocks blocks;
  std::int64_t group_size;
  bool by_tiles;       // tile registers multiply
  std::int64_t scaled_size, entries;
  Members members;
  E* scaled;           // (entries, scaled_size): grad_y of the full path, member by member, zeros behind the group
  float* light_sum;    // (entries): sum over the group of grad_y * l
  float* full_sum;     // (kDepthShares, entries): sum over the group of grad_full * f, over a share of the depth

  explicit BackwardPlan(const midl::LinearBackward& c)
      : call(c), grad_y(static_cast<const E*>(c.grad_y)), x(static_cast<const E*>(c.x)),
        weight(static_cast<const E*>(c.weight)), grad_light(static_cast<E*>(c.grad_light)),
        blocks(c.rows, c.positions, c.span), group_size(c.neurons / c.groups),
        by_tiles(kTiles && sizeof(E) == 2 && group_size >= kTileGroup),
        scaled_size(round_up(group_size, by_tiles ? kTileDepth : kWord<E>)), entries(c.rows * c.selected_groups) {}

  void carve(Carver& memory) {
    members.first = memory.take<std::int64_t>(call.groups + 2);
    members.row = memory.take<std::int32_t>(entries);
    members.slot = memory.take<std::int32_t>(entries);
    // A tile of members may begin with the last one.
    scaled = memory.take<E>((entries + (by_tiles ? kTileRegisterRows : 0)) * scaled_size);
    light_sum = memory.take<float>(entries);
    full_sum = memory.take<float>(kDepthShares * entries);
  }
  float weight_of(std::int64_t entry) const { return call.hard ? 1.0f : call.gate[members.slot[entry]]; }
  Range share(std::int64_t i) const { return part_of(call.depth, i, kDepthShares, kColumnBlock); }
};

// Elements from row to row of a block of columns: an odd number of cache lines, since rows a power of two apart would
// share a few cache sets.
MIDL_INLINE std::int64_t block_stride(std::int64_t width) { return round_up(width, kOuterColumns) + 16; }

template <class E>
struct BackwardMemory {
  const float** rows;
  float *slice, *light, *gradients, *weights;
  E* inputs;
  std::uint32_t* pairs;
  float *joined, *tile;  // for tile registers

  BackwardMemory(Carver& memory, const BackwardPlan<E>& plan) {
    rows = memory.take<const float*>(kBackwardRows);
    slice = memory.take<float>(slice_floats());
    light = memory.take<float>(kBackwardRows * kPanelWidth);
    const std::int64_t rows = lesser(plan.call.rows, kBackwardRows);
    inputs = memory.take<E>(rows * block_stride(kColumnBlock));
    gradients = memory.take<float>(rows * block_stride(kColumnBlock));
    weights = memory.take<float>((plan.by_tiles ? plan.scaled_size : plan.group_size) * block_stride(kColumnBlock));
    pairs = memory.take<std::uint32_t>(sizeof(E) != 2 ? 0
                                       : plan.by_tiles ? round_up(rows, kTileDepth) / 2 * plan.scaled_size
                                                       : divide_up(rows, 2) * plan.group_size);
    joined = memory.take<float>(plan.by_tiles ? round_up(rows, kTileDepth) / 2 * block_stride(kColumnBlock) : 0);
    tile = memory.take<float>(plan.by_tiles ? kTileRegisterRows * kOuterColumns : 0);
  }
};

// Split grad_y of some neurons into the shares of full and light path; the result is the sum of grad_y * other.
template <class E, class F>
MIDL_INLINE float split_neurons(const E* grad_y, const F* other, std::int64_t width, float weight, E* scaled,
                                E* grad_light) {
  Vec lanes = {};
  std::int64_t j = 0;
  for (; j + L <= width; j += L) {
    const Vec grad = load(grad_y + j);
    lanes += grad * load(other + j);
    store_as(scaled + j, grad * weight);
    store_as(grad_light + j, grad * (1 - weight));
  }
  float total = 0;
  for (int lane = 0; lane < L; ++lane) total += lanes[lane];
  for (; j < width; ++j) {
    const float grad = to_float(grad_y[j]);
    total += grad * to_float(other[j]);
    store_as(scaled + j, grad * weight);
    store_as(grad_light + j, grad * (1 - weight));
  }
  return total;
}

// Split grad_y of one group's members into the shares of full and light path, and sum grad_y * l over the group. The
// others' share is the light path's alone: grad_light begins as a copy.
template <class E>
void split_members(const BackwardPlan<E>& plan, BackwardMemory<E>& memory, std::int64_t group) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size, first = group * size;
  const std::int64_t end = plan.members.first[group + 1];
  for (std::int64_t e = plan.members.first[group]; e < end; e += kBackwardRows) {
    const std::int64_t m = lesser(kBackwardRows, end - e);
    for (std::int64_t i = 0; i < m; ++i) {
      memory.rows[i] = c.code + plan.members.row[e + i] * c.rank;
      plan.light_sum[e + i] = 0;
    }
    for (std::int64_t part = 0; part < size; part += kPanelWidth) {
      const std::int64_t width = lesser(kPanelWidth, size - part);
      multiply_neurons(memory.rows, m,
                       Neurons<float>{c.light_up + (first + part) * c.rank, c.rank, nullptr, int(width)}, c.rank,
                       nullptr, memory.slice, memory.light, kPanelWidth);
      for (std::int64_t i = 0; i < m; ++i) {
        const std::int64_t at = plan.members.row[e + i] * c.neurons + first + part;
        const float weight = plan.weight_of(e + i);
        E* scaled = plan.scaled + (e + i) * plan.scaled_size + part;
        plan.light_sum[e + i] +=
            split_neurons(plan.grad_y + at, memory.light + i * kPanelWidth, width, weight, scaled, plan.grad_light + at);
        if (part + width == size)
          for (std::int64_t j = width; j < plan.scaled_size - part; ++j) store_as(scaled + j, 0.0f);
      }
    }
  }
}

// A group's words over some columns: neurons as they are, or two and two, zeros behind the last.
template <class E, int Step = kOuterColumns>
void gather_weights(const E* from, std::int64_t size, std::int64_t depth, std::int64_t width, float* to, std::int64_t stride) {
  if constexpr (sizeof(E) == 4) {
    for (std::int64_t j = 0; j < size; ++j) copy_columns(from + j * depth, width, Step, to + j * stride);
  } else {
    for (std::int64_t j = 0; j < size; j += 2, to += stride) {
      const E *first = from + j * depth, *second = first + depth;
      const bool pair = j + 1 < size;
      std::int64_t i = 0;
      for (; i + 2 * L <= width; i += 2 * L) {
        const Halves a = (Halves)load_pairs(first + i), b = pair ? (Halves)load_pairs(second + i) : Halves{};
        store(to + i, (Vec)join_halves<false>(a, b));
        store(to + i + L, (Vec)join_halves<true>(a, b));
      }
      for (; i < width; ++i)
        to[i] = __builtin_bit_cast(float, std::uint32_t(first[i].bits) | (pair ? std::uint32_t(second[i].bits) << 16 : 0));
      for (; i < round_up(width, Step); ++i) to[i] = 0;
    }
  }
}

template <class E>
MIDL_INLINE Vec splat_word(const E* p) {
  if constexpr (sizeof(E) == 2)
    return (Vec)splat(pair_at(p));
  else
    return splat(*p);
}

// u = grad_full of R members . kOuterVectors vectors of columns of their group's weights, for all columns of a block; then
// grad_x += u, sums += u . x. `size` elements are whole words. Weights and rows have the same stride.
template <int R, class E>
[[gnu::noinline]] void input_tile(const E* scaled, std::int64_t size, const float* weights, const std::int32_t* rows,
                                  const E* x, float* grad_x, std::int64_t stride, std::int64_t width, float* sums) {
  constexpr int V = kOuterVectors;
  Vec sum[L] = {};
  for (std::int64_t i = 0; i < width; i += V * L) {
    Vec acc[R][V] = {};
    const float* b = weights + i;
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < size; k += kWord<E>, b += stride) {
      Vec column[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec value = splat_word(scaled + r * size + k);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] = add_product<E>(acc[r][v], value, column[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const E* from = x + rows[r] * stride + i;
      float* to = grad_x + rows[r] * stride + i;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        store(to + v * L, load(to + v * L) + acc[r][v]);
        sum[r] += acc[r][v] * load(from + v * L);
      }
    }
  }
  float total[L];
  store(total, sum_lanes(sum));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r] += total[r];
}

template <int R = kOuterRows, class... Args>
void input_rows(std::int64_t m, Args... args) {
  if (m == R) return input_tile<R>(args...);
  if constexpr (R > 1) input_rows<R - 1>(m, args...);
}

#ifdef MIDL_TILES
// The same for up to 16 members by tile registers. The group's size is a multiple of kTileDepth, zeros behind its neurons.
[[gnu::noinline]] inline void input_tiles(std::int64_t m, const bf16* scaled, std::int64_t size, const float* weights,
                                          const std::int32_t* rows, const bf16* x, float* grad_x, std::int64_t stride,
                                          std::int64_t width, float* tile, float* sums) {
  constexpr int V = kOuterVectors;
  static_assert(V == 4);
  Vec sum[L] = {};
  for (std::int64_t i = 0; i < width; i += V * L) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    const float* b = weights + i;
    for (std::int64_t k = 0; k < size; k += kTileDepth, b += kTileRegisterRows * stride) {
      tile_load<4>(scaled + k, 2 * size);
      tile_load<5>(b, 4 * stride);
      tile_multiply<0, 4, 5>();
      tile_load<6>(b + L, 4 * stride);
      tile_multiply<1, 4, 6>();
      tile_load<7>(b + 2 * L, 4 * stride);
      tile_multiply<2, 4, 7>();
      tile_load<5>(b + 3 * L, 4 * stride);
      tile_multiply<3, 4, 5>();
    }
    tile_store<0>(tile, 4 * V * L);
    tile_store<1>(tile + L, 4 * V * L);
    tile_store<2>(tile + 2 * L, 4 * V * L);
    tile_store<3>(tile + 3 * L, 4 * V * L);
    for (std::int64_t r = 0; r < m; ++r) {
      const bf16* from = x + rows[r] * stride + i;
      float* to = grad_x + rows[r] * stride + i;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Vec u = load(tile + (r * V + v) * L);
        store(to + v * L, load(to + v * L) + u);
        sum[r] += u * load(from + v * L);
      }
    }
  }
  float total[L];
  store(total, sum_lanes(sum));
  for (std::int64_t r = 0; r < m; ++r) sums[r] += total[r];
}
#endif

template <class E>
void gather_columns(const BackwardPlan<E>& plan, Range rows, std::int64_t col, std::int64_t width, E* block) {
  const std::int64_t stride = block_stride(width);
  for (std::int64_t r = rows.begin; r < rows.end; ++r)
    copy_columns(plan.x + r * plan.call.x_stride + col, width, kOuterColumns, block + (r - rows.begin) * stride);
}

// A block of columns of a group's matrix, fetched into the cache share by share while something else is computed.
struct Fetch {
  const char* from;      // or null
  std::int64_t stride;   // bytes from row to row
  std::int64_t rows, bytes;
  bool to_write;

  MIDL_INLINE void share(std::int64_t i, std::int64_t shares) const {
    if (!from) return;
    for (std::int64_t r = rows * i / shares; r < rows * (i + 1) / shares; ++r)
      for (std::int64_t b = 0; b < bytes; b += 64) {
        if (to_write)
          __builtin_prefetch(from + r * stride + b, 1, 2);
        else
          __builtin_prefetch(from + r * stride + b, 0, 2);
      }
  }
};

// grad_x over one share of the depth, and that share of the sums of grad_full * f.
template <class E>
void grad_input(const BackwardPlan<E>& plan, BackwardMemory<E>& memory, std::int64_t share) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size;
  const Range columns = plan.share(share);
  float* sums = plan.full_sum + share * plan.entries;
  for (std::int64_t e = 0; e < plan.entries; ++e) sums[e] = 0;
  for (std::int64_t col = columns.begin; col < columns.end; col += kColumnBlock) {
    const std::int64_t width = lesser(kColumnBlock, columns.end - col), stride = block_stride(width);
    for (std::int64_t start = 0; start < c.rows; start += kBackwardRows) {
      const std::int64_t stop = lesser(c.rows, start + kBackwardRows);
      gather_columns(plan, {start, stop}, col, width, memory.inputs);
      __builtin_memset(memory.gradients, 0, std::size_t((stop - start) * stride) * sizeof(float));
      for (std::int64_t g = 0; g < c.groups; ++g) {
        const std::int64_t last = plan.members.first[g + 1];
        const std::int64_t begin = plan.members.find_row(plan.members.first[g], last, start);
        const std::int64_t end = plan.members.find_row(begin, last, stop);
        if (begin == end) continue;
        gather_weights(plan.weight + g * size * c.depth + col, size, c.depth, width, memory.weights, stride);
        const E* next = g + 1 < c.groups ? plan.weight + (g + 1) * size * c.depth + col : nullptr;
        constexpr std::int64_t kBytes = sizeof(E);
        const Fetch fetch{reinterpret_cast<const char*>(next), c.depth * kBytes, size, width * kBytes, false};
        if constexpr (kTiles && sizeof(E) == 2) {
          if (plan.by_tiles) {
            const std::int64_t words = divide_up(size, 2), tiles = divide_up(end - begin, kTileRegisterRows);
            __builtin_memset(memory.weights + words * stride, 0,
                             std::size_t((plan.scaled_size / 2 - words) * stride) * sizeof(float));
            for (std::int64_t e = begin; e < end; e += kTileRegisterRows) {
              fetch.share((e - begin) / kTileRegisterRows, tiles);
              input_tiles(lesser(kTileRegisterRows, end - e), plan.scaled + e * plan.scaled_size, plan.scaled_size,
                          memory.weights, plan.members.row + e, memory.inputs - start * stride,
                          memory.gradients - start * stride, stride, width, memory.tile, sums + e);
            }
            continue;
          }
        }
        const std::int64_t tiles = divide_up(end - begin, kOuterRows);
        for (std::int64_t e = begin; e < end; e += kOuterRows) {
          fetch.share((e - begin) / kOuterRows, tiles);
          input_rows(lesser(kOuterRows, end - e), static_cast<const E*>(plan.scaled + e * plan.scaled_size),
                     plan.scaled_size, static_cast<const float*>(memory.weights),
                     static_cast<const std::int32_t*>(plan.members.row + e),
                     static_cast<const E*>(memory.inputs - start * stride), memory.gradients - start * stride, stride,
                     width, sums + e);
        }
      }
      for (std::int64_t r = start; r < stop; ++r)
        copy_floats(memory.gradients + (r - start) * stride, width, c.grad_x + r * c.depth + col);
    }
  }
}

// Gradient of the logits of one group's members, summed over the rows of a block.
template <class E>
void grad_gate(const BackwardPlan<E>& plan, std::int64_t group) {
  const auto& c = plan.call;
  const std::int64_t begin = plan.members.first[group], end = plan.members.first[group + 1];
  for (std::int64_t e = begin; e < end; ++e) c.grad_logits[plan.members.slot[e]] = 0;
  for (std::int64_t e = begin; e < end; ++e) {
    const float gate = c.gate[plan.members.slot[e]], weight = plan.weight_of(e);
    float full = 0;
    for (std::int64_t s = 0; s < kDepthShares; ++s) full += plan.full_sum[s * plan.entries + e];
    // sum of grad_y * (f - l) times gate * (1 - gate); `full` already carries the weight, which is the gate or 1.
    const float slope = c.hard ? gate * (1 - gate) : 1 - gate;
    c.grad_logits[plan.members.slot[e]] += (full - weight * plan.light_sum[e]) * slope;
  }
}

// sums[j][0 .. kOuterColumns) (+)= sum over members k of scaled[k][j] * x[rows[k]], for R neurons.
template <int R>
[[gnu::noinline]] void weight_tile(const float* scaled, std::int64_t size, const float* x, std::int64_t x_stride,
                                   const std::int32_t* rows, std::int64_t members, float* sums, std::int64_t stride,
                                   bool accumulate) {
  constexpr int V = kOuterVectors;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(sums + r * stride + v * L) : Vec{};
  }
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < members; ++k, scaled += size) {
    const float* b = x + rows[k] * x_stride;
    Vec column[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = splat(scaled[r]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] += value * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums + r * stride + v * L, acc[r][v]);
  }
}

// The same for bfloat16, two members at once; pairs[k / 2][j] holds scaled[k][j] and scaled[k + 1][j], zero behind the last.
template <int R>
[[gnu::noinline]] void weight_tile(const std::uint32_t* pairs, std::int64_t size, const bf16* x, std::int64_t x_stride,
                                   const std::int32_t* rows, std::int64_t members, float* sums, std::int64_t stride,
                                   bool accumulate) {
  constexpr int V = kOuterVectors / 2 * 2;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(sums + r * stride + v * L) : Vec{};
  }
  for (std::int64_t k = 0; k < members; k += 2, pairs += size) {
    const bf16* a = x + rows[k] * x_stride;
    UVec column[V];
    if (k + 1 < members) {
      const bf16* b = x + rows[k + 1] * x_stride;
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 2) {
        const Halves first = (Halves)load_pairs(a + v * L), second = (Halves)load_pairs(b + v * L);
        column[v] = join_halves<false>(first, second);
        column[v + 1] = join_halves<true>(first, second);
      }
    } else {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) column[v] = (UVec)load(a + v * L) >> 16;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const UVec value = splat(pairs[r]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = add_dot_pairs(acc[r][v], value, column[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sums + r * stride + v * L, acc[r][v]);
  }
}

template <int R = kOuterRows, class... Args>
void weight_rows(std::int64_t neurons, Args... args) {
  if (neurons == R) return weight_tile<R>(args...);
  if constexpr (R > 1) weight_rows<R - 1>(neurons, args...);
}

// Rows of `size` elements, `stride` apart, as words of two rows; zeros behind the last.
inline void join_rows(const bf16* rows, std::int64_t count, std::int64_t stride, std::int64_t size, std::uint32_t* to) {
  for (std::int64_t k = 0; k < count; k += 2, rows += 2 * stride, to += size) {
    const bool pair = k + 1 < count;
    for (std::int64_t j = 0; j < size; ++j)
      to[j] = std::uint32_t(rows[j].bits) | (pair ? std::uint32_t(rows[stride + j].bits) << 16 : 0);
  }
}

// Write or add sums of `size` neurons to their gradients.
inline void add_sums(const float* sums, std::int64_t stride, std::int64_t size, std::int64_t width, float* grad,
                     std::int64_t grad_stride, bool accumulate) {
  for (std::int64_t j = 0; j < size; ++j, sums += stride, grad += grad_stride) {
    if (!accumulate) {
      copy_floats(sums, width, grad);
      continue;
    }
    std::int64_t i = 0;
    for (; i + L <= width; i += L) store(grad + i, load(grad + i) + load(sums + i));
    for (; i < width; ++i) grad[i] += sums[i];
  }
}

// grad[j][0 .. width) (+)= sum over a group's members k of scaled[k][j] * x[rows[k]] for its `size` neurons; x is a block
// of columns whose rows lie x_stride apart and may be read up to a multiple of kOuterColumns, `sums` has room for
// (size, block_stride(width)). S is float, or words of two members' bfloat16.
template <class S, class E>
void grad_group(const S* scaled, std::int64_t size, const E* x, std::int64_t x_stride, const std::int32_t* rows,
                std::int64_t members, std::int64_t width, float* sums, float* grad, std::int64_t grad_stride, bool accumulate) {
  constexpr std::int64_t kMembers = kWord<E>;  // in a row of `scaled`
  const std::int64_t stride = block_stride(width), tiles = divide_up(size, kOuterRows);
  const Fetch fetch{reinterpret_cast<const char*>(grad), grad_stride * 4, size, width * 4, true};
  const std::int64_t shares = tiles * divide_up(width, kOuterColumns);
  std::int64_t done = 0, item = 0;
  do {
    const std::int64_t some = lesser(kMembersAtOnce, members - done);
    for (std::int64_t i = 0; i < width; i += kOuterColumns)
      for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t j = size * t / tiles;
        if (item < shares) fetch.share(item++, shares);
        weight_rows(size * (t + 1) / tiles - j, scaled + done / kMembers * size + j, size, x + i, x_stride,
                    rows + done, some, sums + j * stride + i, stride, done > 0);
      }
    done += some;
  } while (done < members);
  add_sums(sums, stride, size, width, grad, grad_stride, accumulate);
}

#ifdef MIDL_TILES
// The first operand of tiles: 16 neurons by 32 members, of `count` members and `size` neurons, a multiple of 16; zeros behind
// the last member. Steps of members first, then neurons.
inline void turn_members(const bf16* scaled, std::int64_t count, std::int64_t size, std::uint32_t* to) {
  for (std::int64_t k = 0; k < count; k += kTileDepth)
    for (std::int64_t j = 0; j < size; j += L, to += L * L) {
      Vec block[L];
#pragma GCC unroll 16
      for (int p = 0; p < L; ++p) {
        const std::int64_t first = k + 2 * p;
        const UVec a = first < count ? (UVec)load(scaled + first * size + j) >> 16 : UVec{};
        block[p] = (Vec)(first + 1 < count ? a | (UVec)load(scaled + (first + 1) * size + j) : a);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int p = 0; p < L; ++p) store(reinterpret_cast<float*>(to + p * L), block[p]);
    }
}

// The second: columns of `count` members' rows, two members to a word, zeros behind the last.
inline void join_members(const bf16* x, std::int64_t x_stride, const std::int32_t* rows, std::int64_t count, std::int64_t stride,
                         std::int64_t width, float* to) {
  for (std::int64_t k = 0; k < round_up(count, kTileDepth); k += 2, to += stride) {
    const bf16 *a = k < count ? x + rows[k] * x_stride : nullptr, *b = k + 1 < count ? x + rows[k + 1] * x_stride : nullptr;
    for (std::int64_t i = 0; i < width; i += 2 * L) {
      const Halves first = a ? (Halves)load_pairs(a + i) : Halves{}, second = b ? (Halves)load_pairs(b + i) : Halves{};
      store(to + i, (Vec)join_halves<false>(first, second));
      store(to + i + L, (Vec)join_halves<true>(first, second));
    }
  }
}

// sums[0 .. 16 M)[0 .. 32) = M tiles of neurons . two tiles of columns over all steps of members.
template <int M>
[[gnu::noinline]] void weight_tiles(const std::uint32_t* members, std::int64_t step_size, const float* joined, std::int64_t stride,
                                    std::int64_t steps, float* sums) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (std::int64_t s = 0; s < steps; ++s, members += step_size, joined += kTileRegisterRows * stride) {
    tile_load<4>(joined, 4 * stride);
    tile_load<5>(joined + L, 4 * stride);
    tile_load<6>(members, 64);
    tile_multiply<0, 6, 4>();
    tile_multiply<1, 6, 5>();
    if constexpr (M == 2) {
      tile_load<7>(members + L * L, 64);
      tile_multiply<2, 7, 4>();
      tile_multiply<3, 7, 5>();
    }
  }
  tile_store<0>(sums, 4 * stride);
  tile_store<1>(sums + L, 4 * stride);
  if constexpr (M == 2) {
    tile_store<2>(sums + kTileRegisterRows * stride, 4 * stride);
    tile_store<3>(sums + kTileRegisterRows * stride + L, 4 * stride);
  }
}

// grad_group by tile registers; `scaled` has `scaled_size` elements per member. Memory has pairs, joined and weights.
template <class Memory>
void grad_group_tiles(const bf16* scaled, std::int64_t scaled_size, std::int64_t size, const bf16* x, std::int64_t x_stride,
                             const std::int32_t* rows, std::int64_t members, std::int64_t width, Memory& memory,
                             float* grad, std::int64_t grad_stride, bool accumulate) {
  const std::int64_t stride = block_stride(width), steps = divide_up(members, kTileDepth), columns = round_up(width, 2 * L);
  const Fetch fetch{reinterpret_cast<const char*>(grad), grad_stride * 4, size, width * 4, true};
  turn_members(scaled, members, scaled_size, memory.pairs);
  join_members(x, x_stride, rows, members, stride, columns, memory.joined);
  for (std::int64_t i = 0; i < columns; i += 2 * L) {
    fetch.share(i / (2 * L), columns / (2 * L));
    for (std::int64_t j = 0; j < size; j += 2 * L) {
      const std::uint32_t* from = memory.pairs + j * L;
      float* sums = memory.weights + j * stride + i;
      if (size - j > L)
        weight_tiles<2>(from, scaled_size * L, memory.joined + i, stride, steps, sums);
      else
        weight_tiles<1>(from, scaled_size * L, memory.joined + i, stride, steps, sums);
    }
  }
  add_sums(memory.weights, stride, size, width, grad, grad_stride, accumulate);
}
#endif

// grad_weight over one share of the depth. A block of columns of the inputs is gathered once for all groups.
template <class E>
void grad_neurons(const BackwardPlan<E>& plan, BackwardMemory<E>& memory, std::int64_t share) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size;
  const Range columns = plan.share(share);
  for (std::int64_t col = columns.begin; col < columns.end; col += kColumnBlock) {
    const std::int64_t width = lesser(kColumnBlock, columns.end - col);
    for (std::int64_t start = 0; start < c.rows; start += kBackwardRows) {
      const std::int64_t stop = lesser(c.rows, start + kBackwardRows);
      gather_columns(plan, {start, stop}, col, width, memory.inputs);
      for (std::int64_t g = 0; g < c.groups; ++g) {
        const std::int64_t last = plan.members.first[g + 1];
        const std::int64_t begin = plan.members.find_row(plan.members.first[g], last, start);
        const std::int64_t end = plan.members.find_row(begin, last, stop);
        if (begin == end && start > 0) continue;
        const E* inputs = memory.inputs - start * block_stride(width);
        const std::int32_t* rows = plan.members.row + begin;
        float* grad = c.grad_weight + g * size * c.depth + col;
        const std::int64_t stride = block_stride(width);
        if constexpr (kTiles && sizeof(E) == 2) {
          if (plan.by_tiles) {
            grad_group_tiles(plan.scaled + begin * plan.scaled_size, plan.scaled_size, size, inputs, stride, rows, end - begin,
                             width, memory, grad, c.depth, start > 0);
            continue;
          }
        }
        if constexpr (sizeof(E) == 2) {
          join_rows(plan.scaled + begin * plan.scaled_size, end - begin, plan.scaled_size, size, memory.pairs);
          grad_group(memory.pairs, size, inputs, stride, rows, end - begin, width, memory.weights, grad, c.depth, start > 0);
        } else {
          grad_group(plan.scaled + begin * size, size, inputs, stride, rows, end - begin, width, memory.weights, grad, c.depth,
                     start > 0);
        }
      }
    }
  }
}

template <class E>
void run_backward(const midl::LinearBackward& call) {
  BackwardPlan<E> plan(call);
  const double work = double(plan.entries) * double(plan.group_size) * double(call.depth);
  const int threads = work < kThreadWorth ? 1 : call.threads;
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  BackwardMemory<E> measure(own, plan);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  Carver carver(base);
  plan.carve(carver);
  plan.members.fill(call, plan.blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    BackwardMemory<E> memory(mine, plan);
    [[maybe_unused]] const TilesFor<E> tiles;
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < call.rows; ++r)
      __builtin_memcpy(plan.grad_light + r * call.neurons, plan.grad_y + r * call.neurons,
                       std::size_t(call.neurons) * sizeof(E));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t g = 0; g < call.groups; ++g) split_members(plan, memory, g);
    if (call.grad_x) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t s = 0; s < kDepthShares; ++s) grad_input(plan, memory, s);
#pragma omp for schedule(static) nowait
      for (std::int64_t g = 0; g < call.groups; ++g) grad_gate(plan, g);
    }
    if (call.grad_weight) {
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t s = 0; s < kDepthShares; ++s) grad_neurons(plan, memory, s);
    }
  }
}

template <class E>
void run_split(const midl::GradientSplit& c) {
  const Blocks blocks(c.rows, c.positions, c.span);
  const std::int64_t k = c.selected_groups, size = c.neurons / c.groups;
  const int threads = double(c.rows) * double(c.neurons) < kThreadWorth / 8 ? 1 : c.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (std::int64_t b = 0; b < blocks.count; ++b) {
    const std::int64_t end = b + 1 == blocks.count ? c.rows : blocks.first_row(b + 1);
    const std::int32_t* selected = c.selected + b * k;
    const float* gate = c.gate + b * k;
    float* logits = c.grad_logits + b * k;
    for (std::int64_t i = 0; i < k; ++i) logits[i] = 0;
    for (std::int64_t r = blocks.first_row(b); r < end; ++r) {
      const E* grad_y = static_cast<const E*>(c.grad_y) + r * c.neurons;
      const E* difference = static_cast<const E*>(c.difference) + r * c.difference_stride;
      E* grad_full = static_cast<E*>(c.grad_full) + r * c.grad_full_stride;
      E* grad_light = static_cast<E*>(c.grad_light) + r * c.neurons;
      __builtin_memset(grad_full, 0, std::size_t(c.neurons) * sizeof(E));
      __builtin_memcpy(grad_light, grad_y, std::size_t(c.neurons) * sizeof(E));
      for (std::int64_t i = 0; i < k; ++i) {
        if (selected[i] < 0) continue;
        const std::int64_t at = selected[i] * size;
        logits[i] +=
            split_neurons(grad_y + at, difference + at, size, c.hard ? 1.0f : gate[i], grad_full + at, grad_light + at);
      }
    }
    for (std::int64_t i = 0; i < k; ++i) logits[i] *= gate[i] * (1 - gate[i]);
  }
}

void split_gradient(const midl::GradientSplit& call) {
  if (call.storage == midl::Storage::bfloat16) return run_split<bf16>(call);
  run_split<float>(call);
}

}  // namespace
