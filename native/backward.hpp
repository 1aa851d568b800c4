// Backward pass of the full path: work in proportion to the selected share, the same bits on every run and for any
// number of threads, since every output element is summed by one thread in a fixed order.
//
// The gate's gradient needs the sum over a group of grad_y * f. With u = grad_y . W of the group, which grad_x needs
// anyway, that sum is u . x: the full path is not computed a second time.
#pragma once

#include "forward.hpp"

namespace {

// Columns of the depth whose slices of inputs and weights stay in cache.
constexpr std::int64_t kColumnBlock = 128;
// Fixed shares of the depth, each with its own partial sums for the gate.
constexpr std::int64_t kDepthShares = 8;
constexpr std::int64_t kBackwardRows = 256;

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
        for (std::int64_t i = b * c.selected_groups; i < (b + 1) * c.selected_groups; ++i) visit(c.selected[i], i, begin, end);
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

struct BackwardMemory {
  const float** rows;
  float *slice, *light, *block, *sums;

  BackwardMemory(Carver& memory, const BackwardPlan& plan) {
    rows = memory.take<const float*>(kBackwardRows);
    slice = memory.take<float>(slice_floats());
    light = memory.take<float>(kBackwardRows * kPanelWidth);
    block = memory.take<float>((plan.call.rows > plan.group_size ? plan.call.rows : plan.group_size) *
                               (kColumnBlock + 2 * L));
    sums = memory.take<float>(kBackwardRows * L);
  }
};

// Split grad_y of one group into the shares of full and light path, and sum grad_y * l over the group.
void split_gradient(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t group) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size, first = group * size;
  for (std::int64_t r = 0; r < c.rows; ++r)
    __builtin_memcpy(c.grad_light + r * c.neurons + first, c.grad_y + r * c.neurons + first, std::size_t(size) * 4);
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
        float total = 0;
        for (std::int64_t j = 0; j < width; ++j) {
          const float grad = c.grad_y[at + j];
          total += grad * memory.light[i * kPanelWidth + j];
          scaled[j] = grad * weight;
          c.grad_light[at + j] = grad * (1 - weight);
        }
        plan.light_sum[e + i] += total;
      }
    }
  }
}

// out[r][0 .. 2L) = sum over k < depth of a[r * a_row + k * a_step] * b[k * b_step ..)
template <int R>
[[gnu::noinline]] void outer_tile(const float* a, std::int64_t a_row, std::int64_t a_step, const float* b,
                                  std::int64_t b_step, std::int64_t depth, float* out) {
  Vec acc[R][2] = {};
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) row[r] = a + r * a_row;
  std::int64_t at = 0;
  for (std::int64_t k = 0; k < depth; ++k, at += a_step, b += b_step) {
    const Vec b0 = load(b), b1 = load(b + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = splat(row[r][at]);
      acc[r][0] += value * b0;
      acc[r][1] += value * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(out + r * 2 * L, acc[r][0]), store(out + r * 2 * L + L, acc[r][1]);
}

constexpr int kOuterRows = panel_rows(2);

template <int R = kOuterRows>
void outer_rows(std::int64_t m, const float* a, std::int64_t a_row, std::int64_t a_step, const float* b,
                std::int64_t b_step, std::int64_t depth, float* out) {
  if (m == R) return outer_tile<R>(a, a_row, a_step, b, b_step, depth, out);
  if constexpr (R > 1) outer_rows<R - 1>(m, a, a_row, a_step, b, b_step, depth, out);
}

// Copy `width` columns, padded with zeros to a multiple of 2 L.
MIDL_INLINE void copy_columns(const float* from, std::int64_t width, float* to) {
  __builtin_memcpy(to, from, std::size_t(width) * sizeof(float));
  for (std::int64_t j = width; j < round_up(width, 2 * L); ++j) to[j] = 0;
}

// grad_x over one share of the depth, and that share of the sums of grad_full * f.
void grad_input(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t share) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size;
  const Range columns = plan.share(share);
  float* sums = plan.full_sum + share * plan.entries;
  for (std::int64_t e = 0; e < plan.entries; ++e) sums[e] = 0;
  for (std::int64_t r = 0; r < c.rows; ++r)
    for (std::int64_t i = columns.begin; i < columns.end; ++i) c.grad_x[r * c.depth + i] = 0;
  for (std::int64_t col = columns.begin; col < columns.end; col += kColumnBlock) {
    const std::int64_t width = lesser(kColumnBlock, columns.end - col), stride = round_up(width, 2 * L);
    for (std::int64_t start = 0; start < c.rows; start += kBackwardRows) {
      for (std::int64_t g = 0; g < c.groups; ++g) {
        const std::int64_t last = plan.members.first[g + 1];
        const std::int64_t begin = plan.members.find_row(plan.members.first[g], last, start);
        const std::int64_t end = plan.members.find_row(begin, last, start + kBackwardRows);
        if (begin == end) continue;
        for (std::int64_t j = 0; j < size; ++j)
          copy_columns(c.weight + (g * size + j) * c.depth + col, width, memory.block + j * stride);
        for (std::int64_t e = begin; e < end; e += kOuterRows) {
          const std::int64_t m = lesser(kOuterRows, end - e);
          for (std::int64_t r = 0; r < m; ++r) store(memory.sums + r * L, Vec{});
          for (std::int64_t i = 0; i < width; i += 2 * L) {
            float tile[kOuterRows * 2 * L];
            outer_rows(m, plan.scaled + e * size, size, 1, memory.block + i, stride, size, tile);
            const std::int64_t count = lesser(2 * L, width - i);
            for (std::int64_t r = 0; r < m; ++r) {
              const std::int64_t row = plan.members.row[e + r];
              const float* x = c.x + row * c.x_stride + col + i;
              float* grad = c.grad_x + row * c.depth + col + i;
              const float* u = tile + r * 2 * L;
              if (count == 2 * L) {
                const Vec u0 = load(u), u1 = load(u + L);
                store(grad, load(grad) + u0);
                store(grad + L, load(grad + L) + u1);
                store(memory.sums + r * L, load(memory.sums + r * L) + u0 * load(x) + u1 * load(x + L));
              } else {
                for (std::int64_t j = 0; j < count; ++j) {
                  grad[j] += u[j];
                  memory.sums[r * L] += u[j] * x[j];
                }
              }
            }
          }
          for (std::int64_t r = 0; r < m; ++r)
            for (int lane = 0; lane < L; ++lane) sums[e + r] += memory.sums[r * L + lane];
        }
      }
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

// grad_weight of one group over one share of the depth.
void grad_neurons(const BackwardPlan& plan, BackwardMemory& memory, std::int64_t group, std::int64_t share) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size, begin = plan.members.first[group];
  const std::int64_t m = plan.members.first[group + 1] - begin, tiles = divide_up(size, kOuterRows);
  const Range columns = plan.share(share);
  for (std::int64_t col = columns.begin; col < columns.end; col += kColumnBlock) {
    const std::int64_t width = lesser(kColumnBlock, columns.end - col), stride = round_up(width, 2 * L);
    for (std::int64_t e = 0; e < m; ++e)
      copy_columns(c.x + plan.members.row[begin + e] * c.x_stride + col, width, memory.block + e * stride);
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Range neurons{size * t / tiles, size * (t + 1) / tiles};
      for (std::int64_t i = 0; i < width; i += 2 * L) {
        float tile[kOuterRows * 2 * L];
        outer_rows(neurons.end - neurons.begin, plan.scaled + begin * size + neurons.begin, 1, size, memory.block + i,
                   stride, m, tile);
        const std::int64_t count = lesser(2 * L, width - i);
        for (std::int64_t j = neurons.begin; j < neurons.end; ++j)
          __builtin_memcpy(c.grad_weight + (group * size + j) * c.depth + col + i, tile + (j - neurons.begin) * 2 * L,
                           std::size_t(count) * sizeof(float));
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
      for (std::int64_t i = 0; i < call.groups * kDepthShares; ++i)
        grad_neurons(plan, memory, i / kDepthShares, i % kDepthShares);
    }
  }
}

}  // namespace
