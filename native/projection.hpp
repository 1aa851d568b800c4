// A plain product of rows with a matrix, and its gradients: the light path of a training step, whose matrices are as thin
// as the rank is low. The same bits on every run and for any number of threads.
//
// All three products are panels of columns, copied as they lie: what runs over the rows of a panel are rows of x or of
// the gradient, or the thinner of the two transposed.
#pragma once

#include "backward.hpp"

namespace {

constexpr std::int64_t kPanelColumns = 2 * L;
// Rows that a thread should have at least, to repay the copy of a panel, and at most, so that they stay in cache.
constexpr std::int64_t kLeastRows = 64, kMostRows = 256;

// out (m x width) (+)= rows (m x depth, by pointer) . matrix (depth x width) for width <= kPanelColumns; `sums` holds
// m * kPanelColumns floats, `slice` slice_floats().
template <class E>
void multiply_columns(const E* const* rows, std::int64_t m, const E* matrix, std::int64_t stride, std::int64_t depth,
                      std::int64_t width, bool accumulate, float* slice, float* sums, float* out, std::int64_t ldo) {
  const std::int64_t lanes = round_up(width, L);
  // Whole vectors are written: where they would reach beyond the columns, elsewhere first.
  const bool direct = width == lanes;
  float* to = direct ? out : sums;
  const std::int64_t to_stride = direct ? ldo : kPanelColumns;
  const std::int64_t step = round_up(divide_up(depth, divide_up(depth, kDepthBlock)), kPadding<E> > L ? kPadding<E> : L);
  for (std::int64_t start = 0; start < depth; start += step) {
    const std::int64_t length = lesser(step, depth - start);
    gather_weights<E, L>(matrix + start * stride, length, stride, width, slice, lanes);
    const E* panel = reinterpret_cast<const E*>(slice);
    const bool add = start > 0 || (direct && accumulate);
    if constexpr (kTiles && sizeof(E) == 2) {
      const std::int64_t words = divide_up(length, 2), padded = round_up(length, kPadding<E>) / 2;
      __builtin_memset(slice + words * lanes, 0, std::size_t((padded - words) * lanes) * sizeof(float));
      char* ring = reinterpret_cast<char*>(slice + kDepthBlock / 2 * kPanelColumns);
      const auto multiply = lanes > L ? multiply_slice<2> : multiply_slice<1>;
      multiply(rows, m, whole_steps(depth), start / kPadding<E>, divide_up(start + length, kPadding<E>), panel, ring, nullptr, to,
               to_stride, add, Ahead{});
      continue;
    }
    const auto tiles = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const std::int64_t count = divide_up(m, panel_rows(V));
      for (std::int64_t t = 0, r = 0; t < count; ++t) {
        const std::int64_t end = m * (t + 1) / count;
        panel_rows_tile<V>(end - r, rows + r, start, panel, length, static_cast<const float*>(nullptr), to + r * to_stride,
                           to_stride, add);
        r = end;
      }
    };
    if (lanes > L)
      tiles(std::integral_constant<int, 2>{});
    else
      tiles(std::integral_constant<int, 1>{});
  }
  if (direct) return;
  for (std::int64_t r = 0; r < m; ++r)
    for (std::int64_t j = 0; j < width; ++j)
      out[r * ldo + j] = (accumulate ? out[r * ldo + j] : 0.0f) + sums[r * kPanelColumns + j];
}

// to (columns x rows) = the columns [from_column, from_column + columns) of a matrix, transposed.
template <class E, class F>
void transpose_columns(const E* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, F* to,
                       std::int64_t to_stride) {
  for (std::int64_t j = 0; j < columns; j += L) {
    const std::int64_t width = lesser(L, columns - j);
    std::int64_t i = 0;
    for (; width == L && i + L <= rows; i += L) {
      Vec block[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) block[l] = load(from + (i + l) * stride + j);
      transpose(block);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store_as(to + (j + l) * to_stride + i, block[l]);
    }
    for (; i < rows; ++i)
      for (std::int64_t l = 0; l < width; ++l) store_as(to + (j + l) * to_stride + i, to_float(from[i * stride + j + l]));
  }
}

// Pieces of a product: parts of its rows by blocks of its columns.
struct Pieces {
  std::int64_t rows, columns, row_parts, column_blocks;
  Pieces(std::int64_t rows_, std::int64_t columns_, std::int64_t block, int threads)
      : rows(rows_), columns(columns_), column_blocks(divide_up(columns_, block)) {
    const std::int64_t wanted = divide_up(4 * threads, column_blocks), most = divide_up(rows, kLeastRows);
    row_parts = threads == 1 ? 1 : lesser(wanted, most);
    if (row_parts < divide_up(rows, kMostRows)) row_parts = divide_up(rows, kMostRows);
  }
  std::int64_t count() const { return row_parts * column_blocks; }
  // Neighbours share the rows.
  Range part(std::int64_t i) const { return part_of(rows, i / column_blocks, row_parts, 1); }
  std::int64_t block(std::int64_t i) const { return i % column_blocks; }
};

inline int threads_worth(double work, int threads) { return work < kThreadWorth ? 1 : threads; }

template <class E>
struct ProductMemory {
  const E** rows;
  float *slice, *sums;
  ProductMemory(Carver& memory, std::int64_t most_rows) {
    rows = memory.take<const E*>(most_rows);
    slice = memory.take<float>(slice_floats());
    sums = memory.take<float>(most_rows * (kPanelWidth > kPanelColumns ? kPanelWidth : kPanelColumns));
  }
};

template <class E>
void run_projection(const midl::Projection& c) {
  const int threads = threads_worth(double(c.rows) * double(c.depth) * double(c.neurons), c.threads);
  const Pieces pieces(c.rows, c.neurons, kPanelWidth, threads);
  const std::int64_t most = divide_up(c.rows, pieces.row_parts);
  Carver measure(nullptr);
  ProductMemory<E> measured(measure, most);
  char* base = midl::scratch(measure.used() * std::size_t(threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + measure.used() * std::size_t(omp_get_thread_num()));
    ProductMemory<E> memory(mine, most);
    [[maybe_unused]] const TilesFor<E> tiles;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < pieces.count(); ++i) {
      const Range rows = pieces.part(i);
      const std::int64_t first = pieces.block(i) * kPanelWidth, count = lesser(kPanelWidth, c.neurons - first);
      const std::int64_t m = rows.end - rows.begin;
      for (std::int64_t r = 0; r < m; ++r) memory.rows[r] = static_cast<const E*>(c.x) + (rows.begin + r) * c.x_stride;
      const Neurons<E> neurons{static_cast<const E*>(c.weight) + first * c.depth, c.depth, nullptr, int(count)};
      float* out = c.y + rows.begin * c.neurons + first;
      const auto multiply = [&](float* to, std::int64_t stride) {
        if constexpr (kTiles && sizeof(E) == 2)
          multiply_tiles(memory.rows, m, neurons, c.depth, whole_steps(c.depth, 2 * c.x_stride), nullptr, memory.slice, to, stride);
        else
          multiply_neurons(memory.rows, m, neurons, c.depth, nullptr, memory.slice, to, stride);
      };
      // Tiles of neurons are wider than vectors.
      if (count % (kTiles && sizeof(E) == 2 && count > L ? 2 * L : L) == 0) {
        multiply(out, c.neurons);
      } else {
        multiply(memory.sums, kPanelWidth);
        for (std::int64_t r = 0; r < m; ++r) copy_floats(memory.sums + r * kPanelWidth, count, out + r * c.neurons);
      }
    }
  }
}

// grad_weight (neurons x depth) is grad_y^T . x. Of the two the thinner is transposed, and the result with it if that is x.
template <class E>
struct WeightProduct {
  const E *thin, *wide;
  std::int64_t thin_stride, wide_stride, thin_columns, wide_columns, rows;
  bool transposed;
  explicit WeightProduct(const midl::ProjectionBackward& c) : rows(c.rows), transposed(c.depth < c.neurons) {
    const E *grad_y = static_cast<const E*>(c.grad_y), *x = static_cast<const E*>(c.x);
    thin = transposed ? x : grad_y, thin_stride = transposed ? c.x_stride : c.neurons;
    wide = transposed ? grad_y : x, wide_stride = transposed ? c.neurons : c.x_stride;
    thin_columns = transposed ? c.depth : c.neurons, wide_columns = transposed ? c.neurons : c.depth;
  }
  std::int64_t stride() const { return round_up(rows, L) + L; }
};

template <class E>
void run_projection_backward(const midl::ProjectionBackward& c) {
  const int threads = threads_worth(double(c.rows) * double(c.depth) * double(c.neurons), c.threads);
  const Pieces pieces(c.rows, c.depth, kPanelColumns, threads);
  const WeightProduct<E> product(c);
  const std::int64_t input_rows = c.grad_x ? divide_up(c.rows, pieces.row_parts) : 0;
  const std::int64_t weight_rows = c.grad_weight ? product.thin_columns : 0;
  const std::int64_t most = input_rows > weight_rows ? input_rows : weight_rows;
  Carver shared(nullptr), own(nullptr);
  shared.take<E>(weight_rows * product.stride());
  ProductMemory<E> measured(own, most);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  E* thin = reinterpret_cast<E*>(base);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    ProductMemory<E> memory(mine, most);
    [[maybe_unused]] const TilesFor<E> tiles;
    if (c.grad_weight) {
      const std::int64_t blocks = divide_up(c.rows, std::int64_t(4 * L));
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < blocks; ++i) {
        const Range rows = part_of(c.rows, i, blocks, 4 * L);
        transpose_columns(product.thin + rows.begin * product.thin_stride, product.thin_stride, rows.end - rows.begin,
                          product.thin_columns, thin + rows.begin, product.stride());
      }
      for (std::int64_t j = 0; j < weight_rows; ++j) memory.rows[j] = thin + j * product.stride();
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t first = 0; first < product.wide_columns; first += kPanelColumns) {
        const std::int64_t width = lesser(kPanelColumns, product.wide_columns - first);
        if (product.transposed) {
          multiply_columns(memory.rows, weight_rows, product.wide + first, product.wide_stride, c.rows, width, false,
                           memory.slice, memory.sums, memory.sums, kPanelColumns);
          transpose_columns(memory.sums, kPanelColumns, weight_rows, width, c.grad_weight + first * c.depth, c.depth);
        } else {
          multiply_columns(memory.rows, weight_rows, product.wide + first, product.wide_stride, c.rows, width, false,
                           memory.slice, memory.sums, c.grad_weight + first, c.depth);
        }
      }
    }
    if (c.grad_x) {
#pragma omp for schedule(dynamic, 1) nowait
      for (std::int64_t i = 0; i < pieces.count(); ++i) {
        const Range rows = pieces.part(i);
        const std::int64_t first = pieces.block(i) * kPanelColumns, m = rows.end - rows.begin;
        for (std::int64_t r = 0; r < m; ++r)
          memory.rows[r] = static_cast<const E*>(c.grad_y) + (rows.begin + r) * c.neurons;
        multiply_columns(memory.rows, m, static_cast<const E*>(c.weight) + first, c.depth, c.neurons,
                         lesser(kPanelColumns, c.depth - first), c.accumulate, memory.slice, memory.sums,
                         c.grad_x + rows.begin * c.depth + first, c.depth);
      }
    }
  }
}

void projection(const midl::Projection& call) {
  if (call.rows == 0) return;
  if constexpr (kDotPairs) {
    if (call.storage == midl::Storage::bfloat16) return run_projection<bf16>(call);
  }
  run_projection<float>(call);
}

void projection_backward(const midl::ProjectionBackward& call) {
  if (call.rows == 0) return;
  if constexpr (kDotPairs) {
    if (call.storage == midl::Storage::bfloat16) return run_projection_backward<bf16>(call);
  }
  run_projection_backward<float>(call);
}

}  // namespace
