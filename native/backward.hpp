// Backward pass of the full path: work in proportion to the selected share, the same bits on every run and for any
// number of threads, since every output element is summed by one thread in a fixed order.
//
// The gate's gradient needs the sum over a group of grad_y * f. With u = grad_y . W of the group, which grad_x needs
// anyway, that sum is u . x: the full path is not computed a second time.
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

struct BackwardPlan {
  const midl::LinearBackward& call;
  Blocks blocks;
  std::int64_t group_size, entries;
  Members members;
  float* scaled;       // (entries, group_size): grad_y of the full path, member by member
  float* light_sum;    // (entries): sum over the group of grad_y * l
  float* full_sum;     // (kDepthShares, entries): sum over the group of grad_full * f, over a share of the depth

  explicit BackwardPlan(const midl::LinearBackward& c)
      : call(c), blocks(c.rows, c.positions, c.span), group_size(c.neurons / c.groups),
        entries(c.rows * c.selected_groups) {}

  void carve(Carver& memory) {
    members.first = memory.take<std::int64_t>(call.groups + 2);
    members.row = memory.take<std::int32_t>(entries);
    members.slot = memory.take<std::int32_t>(entries);
    scaled = memory.take<float>(entries * group_size);
    light_sum = memory.take<float>(entries);
    full_sum = memory.take<float>(kDepthShares * entries);
  }
  float weight_of(std::int64_t entry) const { return call.hard ? 1.0f : call.gate[members.slot[entry]]; }
  Range share(std::int64_t i) const { return part_of(call.depth, i, kDepthShares, kColumnBlock); }
};

// Elements from row to row of a block of columns: an odd number of cache lines, since rows a power of two apart would
// share a few cache sets.
MIDL_INLINE std::int64_t block_stride(std::int64_t width) { return round_up(width, kOuterColumns) + 16; }

struct BackwardMemory {
  const float** rows;
  float *slice, *light, *inputs, *gradients, *weights;

  BackwardMemory(Carver& memory, const BackwardPlan& plan) {
    rows = memory.take<const float*>(kBackwardRows);
    slice = memory.take<float>(slice_floats());
    light = memory.take<float>(kBackwardRows * kPanelWidth);
    const std::int64_t rows = lesser(plan.call.rows, kBackwardRows);
    inputs = memory.take<float>(rows * block_stride(kColumnBlock));
    gradients = memory.take<float>(rows * block_stride(kColumnBlock));
    weights = memory.take<float>(plan.group_size * block_stride(kColumnBlock));
  }
};

// Split grad_y of one group's members into the shares of full and light path, and sum grad_y * l over the group. The
// others' share is the light path's alone: grad_light begins as a copy.
void split_gradient(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t group) {
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
        float* scaled = plan.scaled + (e + i) * size + part;
        const float* light = memory.light + i * kPanelWidth;
        Vec lanes = {};
        std::int64_t j = 0;
        for (; j + L <= width; j += L) {
          const Vec grad = load(c.grad_y + at + j);
          lanes += grad * load(light + j);
          store(scaled + j, grad * weight);
          store(c.grad_light + at + j, grad * (1 - weight));
        }
        float total = 0;
        for (int lane = 0; lane < L; ++lane) total += lanes[lane];
        for (; j < width; ++j) {
          const float grad = c.grad_y[at + j];
          total += grad * light[j];
          scaled[j] = grad * weight;
          c.grad_light[at + j] = grad * (1 - weight);
        }
        plan.light_sum[e + i] += total;
      }
    }
  }
}

// Copy `width` columns, padded with zeros to a multiple of `step`.
MIDL_INLINE void copy_columns(const float* from, std::int64_t width, std::int64_t step, float* to) {
  copy_floats(from, width, to);
  for (std::int64_t j = width; j < round_up(width, step); ++j) to[j] = 0;
}

// u = grad_full of R members . kOuterVectors vectors of columns of their group's weights, for all columns of a block; then
// grad_x += u, sums += u . x. Weights and rows have the same stride.
template <int R>
[[gnu::noinline]] void input_tile(const float* scaled, std::int64_t size, const float* weights, const std::int32_t* rows,
                                  const float* x, float* grad_x, std::int64_t stride, std::int64_t width, float* sums) {
  constexpr int V = kOuterVectors;
  Vec sum[L] = {};
  for (std::int64_t i = 0; i < width; i += V * L) {
    Vec acc[R][V] = {};
    const float* b = weights + i;
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < size; ++k, b += stride) {
      Vec column[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec value = splat(scaled[r * size + k]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] += value * column[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float* from = x + rows[r] * stride + i;
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

void gather_columns(const BackwardPlan& plan, Range rows, std::int64_t col, std::int64_t width, float* block) {
  const auto& c = plan.call;
  const std::int64_t stride = block_stride(width);
  for (std::int64_t r = rows.begin; r < rows.end; ++r)
    copy_columns(c.x + r * c.x_stride + col, width, kOuterColumns, block + (r - rows.begin) * stride);
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
void grad_input(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t share) {
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
        for (std::int64_t j = 0; j < size; ++j)
          copy_columns(c.weight + (g * size + j) * c.depth + col, width, kOuterColumns, memory.weights + j * stride);
        const float* next = g + 1 < c.groups ? c.weight + (g + 1) * size * c.depth + col : nullptr;
        const Fetch fetch{reinterpret_cast<const char*>(next), c.depth * 4, size, width * 4, false};
        const std::int64_t tiles = divide_up(end - begin, kOuterRows);
        for (std::int64_t e = begin; e < end; e += kOuterRows) {
          fetch.share((e - begin) / kOuterRows, tiles);
          input_rows(lesser(kOuterRows, end - e), plan.scaled + e * size, size, memory.weights,
                                    plan.members.row + e, memory.inputs - start * stride,
                                    memory.gradients - start * stride, stride, width, sums + e);
        }
      }
      for (std::int64_t r = start; r < stop; ++r)
        copy_floats(memory.gradients + (r - start) * stride, width, c.grad_x + r * c.depth + col);
    }
  }
}

// Gradient of the logits of one group's members, summed over the rows of a block.
void grad_gate(const BackwardPlan& plan, std::int64_t group) {
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
[[gnu::noinline]] void weight_tile(const float* scaled, std::int64_t size, const float* x, std::int64_t stride,
                                   const std::int32_t* rows, std::int64_t members, float* sums, bool accumulate) {
  constexpr int V = kOuterVectors;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(sums + r * stride + v * L) : Vec{};
  }
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < members; ++k, scaled += size) {
    const float* b = x + rows[k] * stride;
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

template <int R = kOuterRows, class... Args>
void weight_rows(std::int64_t neurons, Args... args) {
  if (neurons == R) return weight_tile<R>(args...);
  if constexpr (R > 1) weight_rows<R - 1>(neurons, args...);
}

// grad[j][0 .. width) (+)= sum over a group's members k of scaled[k][j] * x[rows[k]] for its `size` neurons; x is a block
// of columns, `sums` has room for (size, block_stride(width)).
void grad_group(const float* scaled, std::int64_t size, const float* x, const std::int32_t* rows, std::int64_t members,
                std::int64_t width, float* sums, float* grad, std::int64_t grad_stride, bool accumulate) {
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
        weight_rows(size * (t + 1) / tiles - j, scaled + done * size + j, size, x + i, stride, rows + done, some,
                    sums + j * stride + i, done > 0);
      }
    done += some;
  } while (done < members);
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

// grad_weight over one share of the depth. A block of columns of the inputs is gathered once for all groups.
void grad_neurons(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t share) {
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
        grad_group(plan.scaled + begin * size, size, memory.inputs - start * block_stride(width),
                   plan.members.row + begin, end - begin, width, memory.weights, c.grad_weight + g * size * c.depth + col,
                   c.depth, start > 0);
      }
    }
  }
}

void linear_backward(const midl::LinearBackward& call) {
  if (call.rows == 0) return;
  BackwardPlan plan(call);
  const double work = double(plan.entries) * double(plan.group_size) * double(call.depth);
  const int threads = work < kThreadWorth ? 1 : call.threads;
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  BackwardMemory measure(own, plan);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  Carver carver(base);
  plan.carve(carver);
  plan.members.fill(call, plan.blocks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    BackwardMemory memory(mine, plan);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < call.rows; ++r)
      __builtin_memcpy(call.grad_light + r * call.neurons, call.grad_y + r * call.neurons,
                       std::size_t(call.neurons) * sizeof(float));
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t g = 0; g < call.groups; ++g) split_gradient(plan, memory, g);
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

}  // namespace
