// Backward pass of the convolution: work in proportion to the selected share, the same bits on every run and for any number
// of threads.
//
// Images are taken in units of a few. What a unit's pixels contribute to its own gradients is the work of one thread, so the
// overlapping windows of grad_x meet no other thread; the gradient of the weights is summed over the units in their order.
// As in backward.hpp the full path is not computed a second time: the gate's gradient comes from the products of grad_x.
#pragma once

#include "backward.hpp"
#include "convolution.hpp"

namespace {

// Output pixels that a unit should have: enough to repay reading all weights.
constexpr std::int64_t kUnitRows = 256;
// Columns of the windows whose slices of inputs and weights stay in cache.
constexpr std::int64_t kWindowColumns = kColumnBlock;
constexpr int kUnitTile = panel_rows(2);
// Pixels whose light path is computed at a time.
constexpr std::int64_t kLightRows = 64;

// A unit's images and, for each group, the pixels that selected it, ascending: its members.
template <class E>
struct Unit {
  E* x;                 // padded images
  std::int64_t* first;  // (groups + 2): the first member of each group, then the end
  std::int32_t* pixel;  // of a member, counted within the unit
  std::int32_t* slot;   // of a member, in `selected`
  std::int32_t* start;  // of a member: the pixel of x where its window begins
  E* scaled;            // (members, scaled_size): gradient of the full path, zeros behind the group
  float* light_sum;     // (members): sum over the group of grad_y * l
  float* full_sum;      // (members): sum over the group of the full path's gradient * f
};

// A stretch of a window: columns [at, at + width), `start` elements behind the window's first.
struct Columns {
  std::int64_t at, start, width;
};

template <class E>
struct ConvolutionBackwardPlan {
  const midl::ConvolutionBackward& call;
  const E *x, *grad_y, *weight;
  E* grad_light;
  PaddedImages padded;
  Blocks blocks;
  std::int64_t group_size;
  bool by_tiles;  // tile registers multiply
  std::int64_t scaled_size, image_rows, images, unit_images, units, unit_rows, unit_floats, round_units, pieces;
  int threads;
  std::int64_t* window;  // of a unit's pixels: where they begin
  Unit<E>* unit;         // of the units at work

  explicit ConvolutionBackwardPlan(const midl::ConvolutionBackward& c)
      : call(c), x(static_cast<const E*>(c.x)), grad_y(static_cast<const E*>(c.grad_y)),
        weight(static_cast<const E*>(c.weight)), grad_light(static_cast<E*>(c.grad_light)), padded(c.images),
        blocks(c.rows, c.positions, c.span), group_size(c.neurons / c.groups),
        by_tiles(kTiles && sizeof(E) == 2 && group_size >= kTileGroup),
        scaled_size(round_up(group_size, by_tiles ? kTileDepth : kWord<E>)) {
    image_rows = c.images.out_height * c.images.out_width;
    images = c.rows / image_rows;
    unit_images = lesser(images, divide_up(kUnitRows, image_rows));
    units = divide_up(images, unit_images);
    unit_rows = unit_images * image_rows;
    // Stretches of columns are handled in whole vectors, which may reach beyond the last window.
    unit_floats = unit_images * padded.lines * padded.line_stride + kOuterColumns;
    pieces = divide_up(padded.run, kWindowColumns);
    const double work = double(c.rows) * double(c.selected_groups) * double(group_size) * double(padded.depth);
    threads = work < kThreadWorth ? 1 : c.threads;
    round_units = lesser(units, 2 * threads);
  }
  void carve(Carver& memory) {
    const std::int64_t members = unit_rows * call.selected_groups;
    window = memory.take<std::int64_t>(unit_rows);
    unit = memory.take<Unit<E>>(round_units);
    for (std::int64_t i = 0; i < round_units; ++i) {
      const Unit<E> u{memory.take<E>(unit_floats), memory.take<std::int64_t>(call.groups + 2),
                   memory.take<std::int32_t>(members), memory.take<std::int32_t>(members), memory.take<std::int32_t>(members),
                   // A tile of members may begin with the last one.
                   memory.take<E>((members + (by_tiles ? kTileRegisterRows : 0)) * scaled_size), memory.take<float>(members),
                   memory.take<float>(members)};
      if (unit) unit[i] = u;
    }
  }
  std::int64_t first_image(std::int64_t u) const { return u * unit_images; }
  std::int64_t images_of(std::int64_t u) const { return lesser(unit_images, images - u * unit_images); }
  std::int64_t rows_of(std::int64_t u) const { return images_of(u) * image_rows; }
  float weight_of(const Unit<E>& u, std::int64_t member) const {
    return call.gate && !call.hard ? call.gate[u.slot[member]] : 1.0f;
  }
  std::int64_t stretches() const { return padded.runs() * pieces; }
  Columns stretch(std::int64_t i) const {
    const Range part = part_of(padded.run, i % pieces, pieces, kOuterColumns);
    return {i / pieces * padded.run + part.begin, padded.run_start(i / pieces) + part.begin, part.end - part.begin};
  }
};

template <class E>
struct ConvolutionBackwardMemory {
  const float** rows;
  float *slice, *light, *gradients, *weights, *sums;
  std::uint32_t* pairs;
  float *joined, *tile;  // for tile registers

  ConvolutionBackwardMemory(Carver& memory, const ConvolutionBackwardPlan<E>& plan) {
    rows = memory.take<const float*>(kLightRows);
    slice = memory.take<float>(slice_floats());
    light = memory.take<float>(kLightRows * kPanelWidth);
    gradients = memory.take<float>(plan.call.grad_x ? plan.unit_floats : 0);
    weights = memory.take<float>((plan.by_tiles ? plan.scaled_size : plan.group_size) * block_stride(kWindowColumns));
    pairs = memory.take<std::uint32_t>(sizeof(E) != 2 ? 0
                                       : plan.by_tiles ? round_up(plan.unit_rows, kTileDepth) / 2 * plan.scaled_size
                                                       : divide_up(plan.unit_rows, 2) * plan.group_size);
    joined = memory.take<float>(plan.by_tiles ? round_up(plan.unit_rows, kTileDepth) / 2 * block_stride(kWindowColumns) : 0);
    tile = memory.take<float>(plan.by_tiles ? kTileRegisterRows * 2 * L : 0);
    sums = memory.take<float>((plan.by_tiles ? kTileRegisterRows : kUnitTile) * L);
  }
};

template <class E>
void find_members(const ConvolutionBackwardPlan<E>& plan, const Unit<E>& u, std::int64_t index) {
  const auto& c = plan.call;
  const std::int64_t start = plan.first_image(index) * plan.image_rows, rows = plan.rows_of(index);
  const auto for_each = [&](auto visit) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t block = plan.blocks.block_of(start + r) * c.selected_groups;
      for (std::int64_t i = block; i < block + c.selected_groups; ++i) {
        const std::int32_t group = c.selected ? c.selected[i] : 0;
        if (group >= 0) visit(group, r, i);
      }
    }
  };
  for (std::int64_t g = 0; g <= c.groups + 1; ++g) u.first[g] = 0;
  // Counted two places on, so that filling leaves first[g] at the first member of g.
  for_each([&](std::int64_t g, std::int64_t, std::int64_t) { ++u.first[g + 2]; });
  for (std::int64_t g = 2; g <= c.groups + 1; ++g) u.first[g] += u.first[g - 1];
  for_each([&](std::int64_t g, std::int64_t r, std::int64_t slot) {
    u.pixel[u.first[g + 1]] = std::int32_t(r);
    u.start[u.first[g + 1]] = std::int32_t(plan.window[r] / c.images.channels);
    u.slot[u.first[g + 1]++] = std::int32_t(slot);
  });
}

// Split grad_y into the shares of full and light path, and sum grad_y * l over each group.
template <class E>
void split_unit(const ConvolutionBackwardPlan<E>& plan, ConvolutionBackwardMemory<E>& memory, const Unit<E>& u,
                std::int64_t index) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size, start = plan.first_image(index) * plan.image_rows;
  if (plan.grad_light)
    __builtin_memcpy(plan.grad_light + start * c.neurons, plan.grad_y + start * c.neurons,
                     std::size_t(plan.rows_of(index) * c.neurons) * sizeof(E));
  for (std::int64_t g = 0; g < c.groups; ++g) {
    for (std::int64_t e = u.first[g], end = u.first[g + 1]; e < end; e += kLightRows) {
      const std::int64_t m = lesser(kLightRows, end - e);
      for (std::int64_t i = 0; i < m; ++i) {
        if (c.code) memory.rows[i] = c.code + (start + u.pixel[e + i]) * c.rank;
        u.light_sum[e + i] = 0;
      }
      for (std::int64_t part = 0; part < size; part += kPanelWidth) {
        const std::int64_t width = lesser(kPanelWidth, size - part), first = g * size + part;
        if (c.code)
          multiply_neurons(memory.rows, m, Neurons<float>{c.light_up + first * c.rank, c.rank, nullptr, int(width)},
                           c.rank, nullptr, memory.slice, memory.light, kPanelWidth);
        for (std::int64_t i = 0; i < m; ++i) {
          const std::int64_t at = (start + u.pixel[e + i]) * c.neurons + first;
          E* scaled = u.scaled + (e + i) * plan.scaled_size + part;
          if (c.code)
            u.light_sum[e + i] += split_neurons(plan.grad_y + at, memory.light + i * kPanelWidth, width,
                                                plan.weight_of(u, e + i), scaled, plan.grad_light + at);
          else
            copy_elements(plan.grad_y + at, width, scaled);
          if (part + width == size)
            for (std::int64_t j = width; j < plan.scaled_size - part; ++j) store_as(scaled + j, 0.0f);
        }
      }
    }
  }
}

// to += u, sums += u * from, for two vectors of a window's columns of which `count` are there.
template <class E>
MIDL_INLINE void add_window(Vec u0, Vec u1, const E* from, float* to, std::int64_t count, float* sums) {
  if (count >= 2 * L) {
    store(to, load(to) + u0);
    store(to + L, load(to + L) + u1);
    if (sums) store(sums, load(sums) + u0 * load(from) + u1 * load(from + L));
    return;
  }
  float u[2 * L];
  store(u, u0), store(u + L, u1);
  for (std::int64_t j = 0; j < count; ++j) {
    to[j] += u[j];
    if (sums) sums[0] += u[j] * to_float(from[j]);
  }
}

// u = full path's gradient of R members . two vectors of columns of their group's weights; gradients += u,
// sums += u * inputs where somebody wants them. Windows begin with the pixels `starts`. Of the last stretch of a run only `count`
// columns are there.
template <int R, class E>
[[gnu::noinline]] void window_tile(const E* scaled, std::int64_t size, const float* weights, std::int64_t weights_stride,
                                   const std::int32_t* starts, std::int64_t channels, const E* inputs, float* gradients,
                                   std::int64_t count, float* sums) {
  Vec acc[R][2] = {};
  const E* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) a[r] = scaled + r * size;
  for (std::int64_t k = 0; k < size; k += kWord<E>, weights += weights_stride) {
    const Vec b0 = load(weights), b1 = load(weights + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = splat_word(a[r] + k);
      acc[r][0] = add_product<E>(acc[r][0], value, b0);
      acc[r][1] = add_product<E>(acc[r][1], value, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const std::int64_t window = starts[r] * channels;
    add_window(acc[r][0], acc[r][1], inputs + window, gradients + window, count, sums ? sums + r * L : nullptr);
  }
}

template <int R = kUnitTile, class... Args>
void window_rows(std::int64_t m, Args... args) {
  if (m == R) return window_tile<R>(args...);
  if constexpr (R > 1) window_rows<R - 1>(m, args...);
}

#ifdef MIDL_TILES
// The same for up to 16 members by tile registers; `size` is a multiple of kTileDepth, zeros behind the neurons.
[[gnu::noinline]] inline void window_tiles(std::int64_t m, const bf16* scaled, std::int64_t size, const float* weights,
                                           std::int64_t weights_stride, const std::int32_t* starts, std::int64_t channels,
                                           const bf16* inputs, float* gradients, std::int64_t count, float* sums, float* tile) {
  tile_zero<0>(), tile_zero<1>();
  for (std::int64_t k = 0; k < size; k += kTileDepth, weights += kTileRegisterRows * weights_stride) {
    tile_load<4>(scaled + k, 2 * size);
    tile_load<5>(weights, 4 * weights_stride);
    tile_load<6>(weights + L, 4 * weights_stride);
    tile_multiply<0, 4, 5>();
    tile_multiply<1, 4, 6>();
  }
  tile_store<0>(tile, 8 * L);
  tile_store<1>(tile + L, 8 * L);
  for (std::int64_t r = 0; r < m; ++r) {
    const std::int64_t window = starts[r] * channels;
    add_window(load(tile + r * 2 * L), load(tile + r * 2 * L + L), inputs + window, gradients + window, count,
               sums ? sums + r * L : nullptr);
  }
}
#endif

// Gradients of a unit's images, and of the gate.
template <class E>
void grad_images(const ConvolutionBackwardPlan<E>& plan, ConvolutionBackwardMemory<E>& memory, const Unit<E>& u,
                 std::int64_t index) {
  const auto& c = plan.call;
  const std::int64_t size = plan.group_size, members = u.first[c.groups];
  __builtin_memset(memory.gradients, 0, std::size_t(plan.unit_floats) * sizeof(float));
  for (std::int64_t e = 0; e < members; ++e) u.full_sum[e] = 0;
  for (std::int64_t g = 0; g < c.groups; ++g) {
    const std::int64_t begin = u.first[g], end = u.first[g + 1];
    if (begin == end) continue;
    for (std::int64_t s = 0; s < plan.stretches(); ++s) {
      const Columns columns = plan.stretch(s);
      if (columns.width == 0) continue;
      const std::int64_t stride = round_up(columns.width, 2 * L);
      gather_weights<E, 2 * L>(plan.weight + g * size * plan.padded.depth + columns.at, size, plan.padded.depth,
                               columns.width, memory.weights, stride);
      if (plan.by_tiles) {
        const std::int64_t words = divide_up(size, 2);
        __builtin_memset(memory.weights + words * stride, 0, std::size_t((plan.scaled_size / 2 - words) * stride) * sizeof(float));
      }
      const std::int64_t step = plan.by_tiles ? kTileRegisterRows : kUnitTile;
      for (std::int64_t e = begin; e < end; e += step) {
        const std::int64_t m = lesser(step, end - e);
        float* sums = c.grad_logits ? memory.sums : nullptr;
        for (std::int64_t r = 0; r < m; ++r) store(memory.sums + r * L, Vec{});
        for (std::int64_t i = 0; i < columns.width; i += 2 * L) {
          if constexpr (kTiles && sizeof(E) == 2) {
            if (plan.by_tiles) {
              window_tiles(m, u.scaled + e * plan.scaled_size, plan.scaled_size, memory.weights + i, stride, u.start + e,
                           c.images.channels, u.x + columns.start + i, memory.gradients + columns.start + i, columns.width - i,
                           sums, memory.tile);
              continue;
            }
          }
          window_rows(m, static_cast<const E*>(u.scaled + e * plan.scaled_size), plan.scaled_size,
                      static_cast<const float*>(memory.weights + i), stride,
                      static_cast<const std::int32_t*>(u.start + e), c.images.channels,
                      static_cast<const E*>(u.x + columns.start + i), memory.gradients + columns.start + i,
                      columns.width - i, sums);
        }
        for (std::int64_t r = 0; sums && r < m; ++r)
          for (int lane = 0; lane < L; ++lane) u.full_sum[e + r] += memory.sums[r * L + lane];
      }
    }
  }
  const auto& image = c.images;
  for (std::int64_t i = 0; i < plan.images_of(index); ++i)
    for (std::int64_t y = 0; y < image.height; ++y) {
      const float* from = memory.gradients + (i * plan.padded.lines + y + image.padding_y) * plan.padded.line_stride +
                          image.padding_x * image.channels;
      float* to = c.grad_x + ((plan.first_image(index) + i) * image.height + y) * image.width * image.channels;
      if (!c.accumulate)
        __builtin_memcpy(to, from, std::size_t(image.width * image.channels) * sizeof(float));
      else
        for (std::int64_t j = 0; j < image.width * image.channels; ++j) to[j] += from[j];
    }
  if (!c.grad_logits) return;
  for (std::int64_t e = 0; e < members; ++e) c.grad_logits[u.slot[e]] = 0;
  for (std::int64_t e = 0; e < members; ++e) {
    const float gate = c.gate[u.slot[e]], weight = plan.weight_of(u, e);
    // As in backward.hpp: the sum already carries the weight, which is the gate or 1.
    const float slope = c.hard ? gate * (1 - gate) : 1 - gate;
    c.grad_logits[u.slot[e]] += (u.full_sum[e] - weight * u.light_sum[e]) * slope;
  }
}

template <class E>
void compute_unit(const ConvolutionBackwardPlan<E>& plan, ConvolutionBackwardMemory<E>& memory, const Unit<E>& u,
                  std::int64_t index) {
  const std::int64_t first = plan.first_image(index) * plan.padded.lines;
  for (std::int64_t i = 0; i < plan.images_of(index) * plan.padded.lines; ++i)
    plan.padded.fill_line(plan.x, first + i, u.x + i * plan.padded.line_stride);
  __builtin_memset(u.x + plan.images_of(index) * plan.padded.lines * plan.padded.line_stride, 0, kOuterColumns * sizeof(E));
  find_members(plan, u, index);
  split_unit(plan, memory, u, index);
  if (plan.call.grad_x) grad_images(plan, memory, u, index);
}

// Gradient of the weights over one stretch of columns, for the units at work.
template <class E>
void grad_filters(const ConvolutionBackwardPlan<E>& plan, ConvolutionBackwardMemory<E>& memory, std::int64_t stretch,
                  Range units) {
  const auto& c = plan.call;
  const Columns columns = plan.stretch(stretch);
  if (columns.width == 0) return;
  const std::int64_t size = plan.group_size, channels = c.images.channels;
  for (std::int64_t index = units.begin; index < units.end; ++index) {
    const Unit<E>& u = plan.unit[index - units.begin];
    const E* inputs = u.x + columns.start;
    for (std::int64_t g = 0; g < c.groups; ++g) {
      const std::int64_t begin = u.first[g], end = u.first[g + 1];
      if (begin == end && index > 0) continue;
      float* grad = c.grad_weight + g * size * plan.padded.depth + columns.at;
      const std::int32_t* starts = u.start + begin;
      if constexpr (kTiles && sizeof(E) == 2) {
        if (plan.by_tiles) {
          grad_group_tiles(u.scaled + begin * plan.scaled_size, plan.scaled_size, size, inputs, channels, starts, end - begin,
                           columns.width, memory, grad, plan.padded.depth, index > 0);
          continue;
        }
      }
      if constexpr (sizeof(E) == 2) {
        join_rows(u.scaled + begin * plan.scaled_size, end - begin, plan.scaled_size, size, memory.pairs);
        grad_group(memory.pairs, size, inputs, channels, starts, end - begin, columns.width, memory.weights,
                   grad, plan.padded.depth, index > 0);
      } else {
        grad_group(u.scaled + begin * size, size, inputs, channels, starts, end - begin, columns.width, memory.weights,
                   grad, plan.padded.depth, index > 0);
      }
    }
  }
}

template <class E>
void run_convolution_backward(const midl::ConvolutionBackward& call) {
  ConvolutionBackwardPlan<E> plan(call);
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  ConvolutionBackwardMemory<E> measure(own, plan);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(plan.threads));
  Carver carver(base);
  plan.carve(carver);
  for (std::int64_t r = 0; r < plan.unit_rows; ++r) plan.window[r] = plan.padded.window(r, 0);
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    ConvolutionBackwardMemory<E> memory(mine, plan);
    [[maybe_unused]] const TilesFor<E> tiles;
    for (std::int64_t first = 0; first < plan.units; first += plan.round_units) {
      const Range units{first, lesser(plan.units, first + plan.round_units)};
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = units.begin; i < units.end; ++i) compute_unit(plan, memory, plan.unit[i - first], i);
      if (!call.grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t s = 0; s < plan.stretches(); ++s) grad_filters(plan, memory, s, units);
    }
  }
}

void convolution_backward(const midl::ConvolutionBackward& call) {
  if (call.rows == 0) return;
  if constexpr (kDotPairs) {
    if (call.storage == midl::Storage::bfloat16) return run_convolution_backward<bf16>(call);
  }
  run_convolution_backward<float>(call);
}

}  // namespace
