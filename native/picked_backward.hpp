// Backward pass of single neurons and pairs where many rows picked theirs (picked.hpp): work in proportion to the selected
// share, the same bits on every run and for any number of threads.
//
// The gradients of x and of the weight are sums of neurons and of rows: each target, a row or a neuron, holds a slice of its
// sum in registers while it adds those sources of a block that it picked, whose slices lie in the nearest cache.
// Neurons whose gradient is zero are left out: behind a ReLU that is about half of those that were selected.
#pragma once

#include "backward.hpp"

namespace {

// Wider groups fill the tiles of backward.hpp well enough.
constexpr std::int64_t kPickedGroup = 2;
// Fewer rows don't repay the copies.
constexpr std::int64_t kPickBackwardRows = 32;
constexpr std::int64_t kPickedBlock = 32;
static_assert(kPickedBlock == kPanelWidth);
// Rows whose gradients are kept in every form that is needed.
constexpr std::int64_t kPickedRows = 512;
// Targets whose slices stay in the second cache level.
constexpr std::int64_t kPickedTargets = 512, kLeastTargets = 64;

// Which of 32 values are not zero, a bit for each.
MIDL_INLINE std::uint32_t nonzero_bits(const float* values) {
  std::uint32_t mask = 0;
  for (int v = 0; v < kPickedBlock; v += L) {
#ifdef __AVX512F__
    mask |= std::uint32_t(_mm512_cmp_ps_mask((__m512)load(values + v), _mm512_setzero_ps(), _CMP_NEQ_UQ)) << v;
#else
    for (int i = 0; i < L; ++i) mask |= std::uint32_t(values[v + i] != 0.0f) << (v + i);
#endif
  }
  return mask;
}

// Coefficients by blocks of kPickedBlock sources: coefficient j of target t in block b lies at b * block_step + t * stride + j,
// the mask of those that are not zero at b * mask_step + t.
struct Picked {
  const float* coefficients;
  std::int64_t block_step, stride;
  const std::uint32_t* masks;
  std::int64_t mask_step;
};

// out[t][slice] (+)= sum over picked sources j of coefficient[t][j] * sources[j], for m targets; the slice has N vectors, of
// the last one `tail` elements.
template <int N>
[[gnu::noinline]] void add_picked_slice(const std::uint32_t* masks, const float* coefficients, std::int64_t stride,
                                        std::int64_t m, const float* sources, float* out, std::int64_t ldo, std::int64_t tail,
                                        bool accumulate, NextSlice next) {
  int fetched = next.from ? 0 : next.neurons;
  std::int64_t due = 0;
  for (std::int64_t t = 0; t < m; ++t, coefficients += stride, out += ldo) {
    for (due += next.neurons; due >= m && fetched < next.neurons; due -= m) next.fetch(fetched++);
    if (accumulate && masks[t] == 0) continue;
    float* last = out + (N - 1) * L;
    Vec acc[N] = {};
    if (accumulate) {
#pragma GCC unroll 16
      for (int i = 0; i < N - 1; ++i) acc[i] = load(out + i * L);
      acc[N - 1] = tail == L ? load(last) : load_first(last, tail);
    }
    for (std::uint32_t left = masks[t]; left; left &= left - 1) {
      const int j = __builtin_ctz(left);
      const float* source = sources + j * (N * L);
      const Vec coefficient = splat(coefficients[j]);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) acc[i] += coefficient * load(source + i * L);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N - 1; ++i) store(out + i * L, acc[i]);
    if (tail == L)
      store(last, acc[N - 1]);
    else
      for (std::int64_t i = 0; i < tail; ++i) last[i] = acc[N - 1][i];
  }
}

template <int N = kPickVectors, class... Args>
void add_picked_vectors(std::int64_t vectors, Args... args) {
  if (vectors == N) return add_picked_slice<N>(args...);
  if constexpr (N > 1) add_picked_vectors<N - 1>(vectors, args...);
}

// out[targets][slice i] (+)= coefficients . sources, all `count` of them. `slice` holds slice_floats() floats.
inline void add_picked(const Picked& picked, Range targets, const float* sources, std::int64_t source_stride, std::int64_t count,
                       const Slices& slices, std::int64_t i, float* slice, float* out, std::int64_t ldo, bool accumulate) {
  const std::int64_t start = slices.begin(i), length = slices.begin(i + 1) - start, vectors = divide_up(length, L);
  for (std::int64_t first = 0; first < count; first += kPickedBlock) {
    const std::int64_t block = first / kPickedBlock, some = lesser(kPickedBlock, count - first);
    for (std::int64_t j = 0; j < some; ++j)
      copy_columns(sources + (first + j) * source_stride + start, length, L, slice + j * vectors * L);
    NextSlice next;
    if (first + kPickedBlock < count)
      next = {reinterpret_cast<const char*>(sources + (first + kPickedBlock) * source_stride + start), source_stride * 4, length * 4,
              int(lesser(kPickedBlock, count - first - kPickedBlock))};
    add_picked_vectors(vectors, picked.masks + block * picked.mask_step + targets.begin,
                       picked.coefficients + block * picked.block_step + targets.begin * picked.stride, picked.stride,
                       targets.end - targets.begin, static_cast<const float*>(slice), out + targets.begin * ldo + start, ldo,
                       length - (vectors - 1) * L, accumulate || first > 0, next);
  }
}

// Everything the threads share, for the rows of a chunk.
struct PickedBackwardPlan {
  const midl::LinearBackward& call;
  const float *grad_y, *x, *weight;
  Blocks blocks;
  Slices slices;
  std::int64_t group_size, width, room, row_blocks;  // width: neurons up to whole blocks
  float* scaled;              // (width / kPickedBlock, room, kPickedBlock): grad_y of the full path, zero where not selected
  float* turned;              // (row blocks, width, kPickedBlock): the same by neurons
  float* terms;               // (room, width): grad_y * (f - l)
  std::uint32_t *row_masks;   // (width / kPickedBlock, room): of scaled
  std::uint32_t *neuron_masks;  // (row blocks, width): of turned

  explicit PickedBackwardPlan(const midl::LinearBackward& c)
      : call(c), grad_y(static_cast<const float*>(c.grad_y)), x(static_cast<const float*>(c.x)),
        weight(static_cast<const float*>(c.weight)), blocks(c.rows, c.positions, c.span), slices(c.depth, L),
        group_size(c.neurons / c.groups), width(round_up(c.neurons, kPickedBlock)), room(lesser(c.rows, kPickedRows)),
        row_blocks(divide_up(room, kPickedBlock)) {}
  float* scaled_at(std::int64_t row, std::int64_t neuron) const {
    return scaled + (neuron / kPickedBlock * room + row) * kPickedBlock + neuron % kPickedBlock;
  }
  void carve(Carver& memory) {
    scaled = memory.take<float>(room * width);
    turned = memory.take<float>(row_blocks * width * kPickedBlock);
    terms = memory.take<float>(room * width);
    row_masks = memory.take<std::uint32_t>(width / kPickedBlock * room);
    neuron_masks = memory.take<std::uint32_t>(row_blocks * width);
  }
};

struct PickedBackwardMemory {
  const float** rows;
  float *slice, *sums, *light, *full;
  explicit PickedBackwardMemory(Carver& memory) {
    rows = memory.take<const float*>(kPickedRows);
    slice = memory.take<float>(slice_floats());
    sums = memory.take<float>(kPickedSums);
    light = memory.take<float>(kPickedRows * kPanelWidth);
    full = memory.take<float>(kPickedRows * kPanelWidth);
  }
};

// Divide grad_y of up to kPickedBlock rows between the paths; begin: the chunk's first row.
inline void split_rows(const PickedBackwardPlan& plan, std::int64_t begin, Range rows) {
  const auto& c = plan.call;
  const std::int64_t k = c.selected_groups, size = plan.group_size, width = plan.width;
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    const std::int64_t block = plan.blocks.block_of(begin + r);
    const float* grad = plan.grad_y + (begin + r) * c.neurons;
    float* light = static_cast<float*>(c.grad_light) + (begin + r) * c.neurons;
    for (std::int64_t j = 0; j < width; j += kPickedBlock) __builtin_memset(plan.scaled_at(r, j), 0, kPickedBlock * sizeof(float));
    __builtin_memcpy(light, grad, std::size_t(c.neurons) * sizeof(float));
    for (std::int64_t i = block * k; i < (block + 1) * k; ++i) {
      if (c.selected[i] < 0) continue;
      const float weight = c.hard ? 1.0f : c.gate[i];
      for (std::int64_t j = c.selected[i] * size; j < (c.selected[i] + 1) * size; ++j) {
        *plan.scaled_at(r, j) = grad[j] * weight;
        light[j] = grad[j] * (1 - weight);
      }
    }
    for (std::int64_t j = 0; j < width; j += kPickedBlock) plan.row_masks[j / kPickedBlock * plan.room + r] = nonzero_bits(plan.scaled_at(r, j));
  }
  const std::int64_t at = rows.begin / kPickedBlock * width;
  for (std::int64_t j = 0; j < width; j += L)
    for (std::int64_t first = 0; first < kPickedBlock; first += L) {
      Vec tile[L];
      for (int r = 0; r < L; ++r)
        tile[r] = rows.begin + first + r < rows.end ? load(plan.scaled_at(rows.begin + first + r, j)) : Vec{};
      transpose(tile);
      for (int n = 0; n < L; ++n) store(plan.turned + (at + j + n) * kPickedBlock + first, tile[n]);
    }
  for (std::int64_t j = 0; j < width; ++j) plan.neuron_masks[at + j] = nonzero_bits(plan.turned + (at + j) * kPickedBlock);
}

// terms = grad_y * (f - l) of a block of neurons; unselected ones have grad_y * -l there, which nobody reads.
inline void compute_terms(const PickedBackwardPlan& plan, PickedBackwardMemory& memory, std::int64_t begin, std::int64_t rows,
                          std::int64_t first) {
  const auto& c = plan.call;
  const int count = int(lesser(kPickedBlock, c.neurons - first));
  for (std::int64_t r = 0; r < rows; ++r) memory.rows[r] = c.code + (begin + r) * c.rank;
  multiply_neurons(memory.rows, rows, Neurons<float>{c.light_up + first * c.rank, c.rank, nullptr, count}, c.rank, nullptr,
                   memory.slice, memory.light, kPanelWidth);
  for (std::int64_t r = 0; r < rows; ++r) memory.rows[r] = plan.x + (begin + r) * c.x_stride;
  const float* weight = plan.weight + first * c.depth;
  dot_picked(memory.rows, plan.row_masks + first / kPickedBlock * plan.room, rows, weight, c.depth, count, c.depth, memory.slice,
             memory.sums, memory.full, static_cast<const float*>(nullptr));
  for (std::int64_t r = 0; r < rows; ++r) {
    const float *grad = plan.grad_y + (begin + r) * c.neurons + first, *full = memory.full + r * kPanelWidth;
    const float* light = memory.light + r * kPanelWidth;
    float* terms = plan.terms + r * plan.width + first;
    for (int j = 0; j < count; ++j) terms[j] = grad[j] * (full[j] - light[j]);
  }
}

// The gradient of a block's logits, as far as its rows in [begin, end) go.
inline void add_logits(const PickedBackwardPlan& plan, std::int64_t block, std::int64_t begin, std::int64_t end) {
  const auto& c = plan.call;
  const std::int64_t k = c.selected_groups, size = plan.group_size, first = plan.blocks.first_row(block);
  const std::int64_t stop = block + 1 == plan.blocks.count ? c.rows : plan.blocks.first_row(block + 1);
  for (std::int64_t i = block * k; i < (block + 1) * k; ++i) {
    if (c.selected[i] < 0) continue;
    float total = 0;
    for (std::int64_t r = first < begin ? begin : first; r < lesser(stop, end); ++r)
      for (std::int64_t j = c.selected[i] * size; j < (c.selected[i] + 1) * size; ++j) total += plan.terms[(r - begin) * plan.width + j];
    const float slope = c.gate[i] * (1 - c.gate[i]);
    c.grad_logits[i] = (first < begin ? c.grad_logits[i] : 0.0f) + total * slope;
  }
}

inline void run_picked_backward(const midl::LinearBackward& call) {
  PickedBackwardPlan plan(call);
  const double work = double(call.rows) * double(call.selected_groups) * double(plan.group_size) * double(call.depth);
  const int threads = work < kThreadWorth ? 1 : call.threads;
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  PickedBackwardMemory measure(own);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  Carver carver(base);
  plan.carve(carver);
  const std::int64_t neuron_blocks = plan.width / kPickedBlock;
  // A target's sum is the same whatever other targets there are, so these may be dealt out by the number of threads.
  const auto parts = [&](std::int64_t targets) {
    const std::int64_t wanted = divide_up(4 * threads, plan.slices.count);
    const std::int64_t least = divide_up(targets, kPickedTargets), most = divide_up(targets, kLeastTargets);
    return wanted < least ? least : lesser(wanted, most);
  };
  const std::int64_t neuron_parts = parts(call.neurons);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    PickedBackwardMemory memory(mine);
    for (std::int64_t begin = 0; begin < call.rows; begin += plan.room) {
      const std::int64_t rows = lesser(plan.room, call.rows - begin), row_parts = parts(rows);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t r = 0; r < rows; r += kPickedBlock) split_rows(plan, begin, {r, lesser(rows, r + kPickedBlock)});
      if (call.grad_x) {
#pragma omp for schedule(dynamic, 1) nowait
        for (std::int64_t i = 0; i < plan.slices.count * row_parts; ++i)
          add_picked({plan.scaled, plan.room * kPickedBlock, kPickedBlock, plan.row_masks, plan.room},
                     part_of(rows, i % row_parts, row_parts, 1), plan.weight, call.depth, call.neurons, plan.slices, i / row_parts,
                     memory.slice, call.grad_x + begin * call.depth, call.depth, false);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t n = 0; n < neuron_blocks; ++n) compute_terms(plan, memory, begin, rows, n * kPickedBlock);
        const std::int64_t first = plan.blocks.block_of(begin), last = plan.blocks.block_of(begin + rows - 1);
#pragma omp for schedule(static) nowait
        for (std::int64_t b = first; b <= last; ++b) add_logits(plan, b, begin, begin + rows);
      }
      if (call.grad_weight) {
#pragma omp for schedule(dynamic, 1) nowait
        for (std::int64_t i = 0; i < plan.slices.count * neuron_parts; ++i)
          add_picked({plan.turned, plan.width * kPickedBlock, kPickedBlock, plan.neuron_masks, plan.width},
                     part_of(call.neurons, i % neuron_parts, neuron_parts, 1), plan.x + begin * call.x_stride, call.x_stride, rows,
                     plan.slices, i / neuron_parts, memory.slice, call.grad_weight, call.depth, begin > 0);
      }
#pragma omp barrier
    }
  }
}

bool backward_picks(midl::Storage storage, std::int64_t rows, std::int64_t groups, std::int64_t selected, std::int64_t group_size) {
  return kPicks<float> && storage == midl::Storage::float32 && group_size <= kPickedGroup && rows >= kPickBackwardRows &&
         double(selected) * kPickCost < double(groups);
}

void linear_backward(const midl::LinearBackward& call) {
  if (call.rows == 0) return;
  if constexpr (kPicks<float>) {
    if (backward_picks(call.storage, call.rows, call.groups, call.selected_groups, call.neurons / call.groups))
      return run_picked_backward(call);
  }
  if constexpr (kDotPairs) {
    if (call.storage == midl::Storage::bfloat16) return run_backward<bf16>(call);
  }
  run_backward<float>(call);
}

}  // namespace
