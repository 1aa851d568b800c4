// Convolutions through the phases of forward.hpp: output pixels are rows, receptive fields their elements, in the order
// kernel row, kernel column, channel.
//
// No patch is copied: in channels-last memory a receptive field is one contiguous segment per kernel row (per tap where
// dilated), and every pixel has its segments at the same distances. The lines of the image that a chunk of pixels looks at
// are copied once, channels last, widened and padded with zeros; they are used in place where they are so already.
#pragma once

#include "forward.hpp"

namespace {

// Shorter segments (few channels) are not worth a call of the panel kernel: there, patches are copied.
constexpr std::int64_t kShortSegment = 32;
// Elements of the copied lines that a chunk of pixels should look at: they are read once per group.
constexpr std::int64_t kChunkElements = 128 * 1024;

// Depth of a pass over a panel: deep enough to repay loading and storing the sums, and the panel's slice stays in cache.
constexpr std::int64_t kPassDepth = 576;

// out[r][0 .. V L) (+)= the segments of rows[r] . a sub-panel's slice; all segments but the depth's last hold whole words.
template <int R, int V, class E>
[[gnu::noinline]] void segment_tile(const E* const* rows, const Segment* segments, std::int64_t count, const E* panel,
                                    float* out, std::int64_t ldo, bool accumulate, Ahead ahead) {
  constexpr int K = kWord<E>;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(out + r * ldo + v * L) : Vec{};
  }
  for (std::int64_t s = 0; s < count; ++s) {
    const std::int64_t depth = segments[s].length;
    const E* a[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) a[r] = rows[r] + segments[s].start;
    std::int64_t i = 0;
    if constexpr (L >= 16) {
      constexpr int U = V == 1 ? 4 : 2;
      const auto add = [&] { add_words<U>(acc, a, i, [&](int u, int v) { return panel + (u * V + v) * L * K; }); };
      if (ahead.from) {
        for (; i + U * K <= depth; i += U * K, panel += U * V * L * K) {
          ahead.fetch<U>();
          add();
        }
      } else {
        for (; i + U * K <= depth; i += U * K, panel += U * V * L * K) add();
      }
    }
    const auto column = [&](int v) { return panel + v * L * K; };
    for (; i + K <= depth; i += K, panel += V * L * K) add_word<R, V, E, E>(acc, a, i, true, column);
    if (i < depth) add_word<R, V, E, E>(acc, a, i, false, column);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + r * ldo + v * L, acc[r][v]);
  }
}

template <int V, int R = panel_rows(V), class... Args>
void segment_rows(std::int64_t m, Args... args) {
  if (m == R) return segment_tile<R, V>(args...);
  if constexpr (R > 1) segment_rows<V, R - 1>(m, args...);
}

// Copy `width` pixels of `channels` from any strides to channels last.
template <class X, class E>
void copy_line(const X* from, std::int64_t channel_stride, std::int64_t column_stride, std::int64_t width,
               std::int64_t channels, E* to) {
  if (channel_stride == 1) {
    for (std::int64_t x = 0; x < width; ++x) copy_elements(from + x * column_stride, channels, to + x * channels);
    return;
  }
  std::int64_t x = 0;
  if (column_stride == 1) {
    for (; x + L <= width; x += L) {
      std::int64_t c = 0;
      for (; c + L <= channels; c += L) {
        Vec block[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) block[j] = load(from + (c + j) * channel_stride + x);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store_as(to + (x + j) * channels + c, block[j]);
      }
      for (; c < channels; ++c)
        for (int j = 0; j < L; ++j) store_as(to + (x + j) * channels + c, to_float(from[c * channel_stride + x + j]));
    }
  }
  for (; x < width; ++x)
    for (std::int64_t c = 0; c < channels; ++c)
      store_as(to + x * channels + c, to_float(from[c * channel_stride + x * column_stride]));
}

// Images channels last, padded with zeros, their lines numbered through all of them; the windows of output pixels in it.
struct PaddedImages {
  midl::Images images;
  std::int64_t lines, line_stride;  // of an image; elements from line to line
  std::int64_t run, runs_per_line;  // contiguous elements of a window; how many of them per kernel row
  std::int64_t depth;               // elements of a window

  explicit PaddedImages(const midl::Images& m)
      : images(m), lines(m.height + 2 * m.padding_y), line_stride((m.width + 2 * m.padding_x) * m.channels) {
    // Kernel columns lie side by side unless they are dilated.
    const bool joined = m.dilation_x == 1 || m.kernel_width == 1;
    runs_per_line = joined ? 1 : m.kernel_width;
    run = joined ? m.kernel_width * m.channels : m.channels;
    depth = m.kernel_height * m.kernel_width * m.channels;
  }
  std::int64_t runs() const { return images.kernel_height * runs_per_line; }
  // Where run i of a window begins, in elements behind the window's first.
  std::int64_t run_start(std::int64_t i) const {
    return i / runs_per_line * images.dilation_y * line_stride + i % runs_per_line * images.dilation_x * images.channels;
  }
  // The first line that an output line looks at, output lines also numbered through.
  std::int64_t first_line(std::int64_t output_line) const {
    return output_line / images.out_height * lines + output_line % images.out_height * images.stride_y;
  }
  // Where the window of an output pixel begins, in elements behind the line `base`.
  std::int64_t window(std::int64_t pixel, std::int64_t base) const {
    return (first_line(pixel / images.out_width) - base) * line_stride +
           pixel % images.out_width * images.stride_x * images.channels;
  }
  template <class X, class E>
  void fill_line(const X* x, std::int64_t line, E* to) const {
    const std::int64_t y = line % lines - images.padding_y, margin = images.padding_x * images.channels;
    const bool inside = y >= 0 && y < images.height;
    const std::size_t zeros = std::size_t(inside ? margin : line_stride) * sizeof(E);
    __builtin_memset(to, 0, zeros);
    if (!inside) return;
    copy_line(x + line / lines * images.batch_stride + y * images.row_stride, images.channel_stride,
              images.column_stride, images.width, images.channels, to + margin);
    __builtin_memset(to + line_stride - margin, 0, zeros);
  }
};

// Output pixels as rows of a layer. X is the type of the images, in and out; parameters have that of the elements that are
// multiplied, always as panels.
template <class X>
class Pixels {
 public:
  using Element = Code<X>;
  using Output = X;
  static constexpr bool kPrepares = true;
  static constexpr bool kSideBySide = false;
  static constexpr bool kByTiles = kTiles && sizeof(Element) == 2;

  Pixels(const midl::Images& images, const X* x) : padded_(images), x_(x) {
    in_place_ = sizeof(X) == sizeof(Element) && images.channel_stride == 1 && images.column_stride == images.channels &&
                !images.padding_x && !images.padding_y;
    if (in_place_) padded_.line_stride = images.row_stride;
    // A word of a panel, or a step of tile registers, must not reach from one run into the next.
    patches_ = padded_.runs() > 1 && (padded_.run < kShortSegment || padded_.run % kPadding<Element> != 0);
  }

  std::int64_t chunk_rows() const {
    return lesser(kChunkRows, round_up(divide_up(kChunkElements, padded_.images.channels), kTileRows));
  }
  void make_room(Range chunk) {
    const Range band = lines_of(chunk);
    if (band.end - band.begin > room_lines_) room_lines_ = band.end - band.begin;
    if (chunk.end - chunk.begin > room_rows_) room_rows_ = chunk.end - chunk.begin;
  }
  void carve(Carver& memory) {
    band_ = memory.take<Element>(in_place_ ? 0 : room_lines_ * padded_.line_stride);
    row_ = memory.take<const Element*>(room_rows_);
    patch_ = memory.take<Element>(patches_ ? room_rows_ * padded_.depth : 0);
    segments_ = patches_ ? divide_up(padded_.depth, kPassDepth) : padded_.runs() * divide_up(padded_.run, kPassDepth);
    segment_ = memory.take<Segment>(segments_);
    if (segment_) fill_segments();
    if constexpr (kByTiles) {
      const TileSteps steps = whole_steps(padded_.depth);
      starts_ = memory.take<std::int64_t>(patches_ ? 0 : steps.count);
      if (starts_ && !patches_)
        for (std::int64_t s = 0; s < steps.count; ++s)
          starts_[s] = padded_.run_start(s * kTileDepth / padded_.run) + s * kTileDepth % padded_.run;
    }
  }

  void prepare(Range chunk, Team team) {
    const auto& m = padded_.images;
    const Range band = lines_of(chunk);
    if (!in_place_) {
      const Range own = part_of(band.end - band.begin, team.thread, team.threads, 1);
      for (std::int64_t i = own.begin; i < own.end; ++i)
        padded_.fill_line(x_, band.begin + i, band_ + i * padded_.line_stride);
      if (patches_) team.wait();
    }
    const Range rows = part_of(chunk.end - chunk.begin, team.thread, team.threads, 1);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      const std::int64_t row = chunk.begin + r, image = row / (m.out_width * m.out_height);
      const Element* first =
          in_place_ ? reinterpret_cast<const Element*>(x_) + image * m.batch_stride + padded_.window(row, image * padded_.lines)
                    : band_ + padded_.window(row, band.begin);
      row_[r] = patches_ ? copy_patch(first, patch_ + r * padded_.depth) : first;
    }
  }
  const Element* row(std::int64_t row, std::int64_t chunk_start) const { return row_[row - chunk_start]; }

  void multiply(const Element* const* rows, std::int64_t m, const Neurons<Element>& neurons, [[maybe_unused]] float* slice,
                float* out, std::int64_t ldo, bool = false) const {
    if constexpr (kByTiles) {
      TileSteps steps = whole_steps(padded_.depth);
      steps.starts = patches_ || padded_.runs() == 1 ? nullptr : starts_;
      return multiply_tiles(rows, m, neurons, padded_.depth, steps, nullptr, slice, out, ldo);
    }
    std::int64_t at = 0;
    for (std::int64_t first = 0, end; first < segments_; first = end) {
      std::int64_t depth = segment_[first].length;
      for (end = first + 1; end < segments_ && depth + segment_[end].length <= kPassDepth; ++end)
        depth += segment_[end].length;
      multiply_pass(rows, m, neurons, segment_ + first, end - first, at, out, ldo);
      at += depth;
    }
  }
  void dot(const Element* const* neurons, int count, const Element* row, float* out) const {
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < segments_; at += segment_[i++].length)
      dot_block(neurons, count, row + (segment_[i].start - at), padded_.depth, 1, at, segment_[i].length, out, 1, i > 0);
  }

 private:
  Range lines_of(Range chunk) const {
    const auto& m = padded_.images;
    return {padded_.first_line(chunk.begin / m.out_width),
            padded_.first_line((chunk.end - 1) / m.out_width) + (m.kernel_height - 1) * m.dilation_y + 1};
  }
  // The products with some of the segments, which begin at depth `at` of the panel. Rows are dealt out to tiles evenly: a
  // tile of one row takes nearly as long as a full one.
  void multiply_pass(const Element* const* rows, std::int64_t m, const Neurons<Element>& neurons, const Segment* segments,
                     std::int64_t count, std::int64_t at, float* out, std::int64_t ldo) const {
    const std::int64_t depth = round_up(padded_.depth, kPadding<Element>);
    [[maybe_unused]] const std::int64_t words = at / kWord<Element>;
    const int wide = wide_neurons<Element>(neurons.count);
    std::int64_t length = 0;
    for (std::int64_t i = 0; i < count; ++i) length += segments[i].length;
    const bool last = at + length >= padded_.depth;
    const Element* next = last ? neurons.next : neurons.panel;
    const auto fetch = [&](int column, int lanes, std::int64_t tile, std::int64_t tiles) {
      return fetch_ahead(neurons.panel, next, column * depth, lanes, at, last ? 0 : at + length, length, tile, tiles);
    };
    for (std::int64_t t = 0, r = 0, tiles = divide_up(m, panel_rows(2)); wide && t < tiles; ++t) {
      const std::int64_t end = m * (t + 1) / tiles;
      for (int c = 0; c < wide; c += 2 * L)
        segment_rows<2>(end - r, rows + r, segments, count, neurons.panel + c * depth + at * (2 * L),
                        out + r * ldo + c, ldo, at > 0, fetch(c, 2 * L, t, tiles));
      r = end;
    }
    if (wide >= neurons.count) return;
    const bool single = sub_panel_lanes<Element>(neurons.count - wide) == L;
    const int tail = single ? wide + L : wide;
    for (std::int64_t t = 0, r = 0, tiles = divide_up(m, panel_rows(1)); t < tiles; ++t) {
      const std::int64_t end = m * (t + 1) / tiles;
      if (single)
        segment_rows<1>(end - r, rows + r, segments, count, neurons.panel + wide * depth + at * L, out + r * ldo + wide, ldo,
                        at > 0, fetch(wide, L, t, tiles));
      if constexpr (kFolds<Element>) {
        if (tail < neurons.count)
          folded_rows(end - r, rows + r, segments, count, neurons.panel + tail * depth + words / 2 * (L * kWord<Element>),
                      words % 2 != 0, static_cast<const float*>(nullptr), out + r * ldo + tail, ldo, at > 0,
                      fetch(tail, L / 2, t, tiles));
      }
      r = end;
    }
  }
  const Element* copy_patch(const Element* first, Element* to) const {
    for (std::int64_t i = 0; i < padded_.runs(); ++i)
      copy_elements(first + padded_.run_start(i), padded_.run, to + i * padded_.run);
    return to;
  }
  void fill_segments() {
    Segment* next = segment_;
    const auto add = [&](std::int64_t start, std::int64_t length) {
      const std::int64_t step = round_up(divide_up(length, divide_up(length, kPassDepth)), L);
      for (std::int64_t i = 0; i < length; i += step) *next++ = {start + i, lesser(step, length - i)};
    };
    if (patches_) {
      add(0, padded_.depth);
    } else {
      for (std::int64_t i = 0; i < padded_.runs(); ++i) add(padded_.run_start(i), padded_.run);
    }
    segments_ = next - segment_;
  }

  PaddedImages padded_;
  const X* x_;
  bool in_place_, patches_;
  std::int64_t segments_ = 0, room_lines_ = 0, room_rows_ = 0;
  Element *band_ = nullptr, *patch_ = nullptr;
  const Element** row_ = nullptr;
  Segment* segment_ = nullptr;
  std::int64_t* starts_ = nullptr;
};

void convolution_forward(const midl::ConvolutionForward& call) {
  if (call.storage == midl::Storage::bfloat16)
    run_forward(call.rows, Pixels<bf16>(call.images, static_cast<const bf16*>(call.rows.x)));
  else
    run_forward(call.rows, Pixels<float>(call.images, static_cast<const float*>(call.rows.x)));
}

template <class E>
void run_code(const midl::ConvolutionCode& call) {
  const Pixels<E> source(call.images, static_cast<const E*>(call.x));
  const E* light_down = static_cast<const E*>(call.light_down);
  const std::int64_t depth = PaddedImages(call.images).depth, panel = kPanelWidth * packed_depth<E>(depth);
  const int threads = double(call.rows) * double(call.rank) * double(depth) < kThreadWorth ? 1 : call.threads;
  const std::int64_t step = divide_up(call.rows, round_up(divide_up(call.rows, source.chunk_rows()), threads));
  const std::int64_t chunks = divide_up(call.rows, step);

  struct Memory {
    Pixels<E> source;
    const E** rows;
    float *sums, *slice;
  };
  const auto carve = [&](Carver& carver) {
    Memory memory{source, carver.take<const E*>(step), carver.take<float>(step * kPanelWidth),
                  carver.take<float>(Pixels<E>::kByTiles ? slice_floats() : 0)};
    for (std::int64_t i = 0; i < chunks; ++i) memory.source.make_room({i * step, lesser(call.rows, (i + 1) * step)});
    memory.source.carve(carver);
    return memory;
  };
  Carver shared(nullptr), own(nullptr);
  shared.take<E>(divide_up(call.rank, kPanelWidth) * panel);
  carve(own);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  E* panels = reinterpret_cast<E*>(base);
  for (std::int64_t first = 0; first < call.rank; first += kPanelWidth)
    pack_panel(light_down + first * depth, depth, int(lesser(kPanelWidth, call.rank - first)), depth,
               panels + first / kPanelWidth * panel);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver carver(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    Memory memory = carve(carver);
    [[maybe_unused]] const TilesFor<E> tiles;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t i = 0; i < chunks; ++i) {
      const Range chunk{i * step, lesser(call.rows, (i + 1) * step)};
      const std::int64_t m = chunk.end - chunk.begin;
      memory.source.prepare(chunk, {1, 0});
      for (std::int64_t r = 0; r < m; ++r) memory.rows[r] = memory.source.row(chunk.begin + r, chunk.begin);
      for (std::int64_t first = 0; first < call.rank; first += kPanelWidth) {
        const std::int64_t count = lesser(kPanelWidth, call.rank - first);
        memory.source.multiply(memory.rows, m, {nullptr, depth, panels + first / kPanelWidth * panel, int(count)},
                               memory.slice, memory.sums, kPanelWidth);
        for (std::int64_t r = 0; r < m; ++r)
          copy_floats(memory.sums + r * kPanelWidth, count, call.code + (chunk.begin + r) * call.rank + first);
      }
    }
  }
}

void convolution_code(const midl::ConvolutionCode& call) {
  if (call.rows == 0) return;
  if constexpr (kDotPairs) {
    if (call.storage == midl::Storage::bfloat16) return run_code<bf16>(call);
  }
  run_code<float>(call);
}

}  // namespace
