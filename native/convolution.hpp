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

// `length` elements, `start` elements behind a row's pointer.
struct Segment {
  std::int64_t start, length;
};

// Copy `width` pixels of `channels` from any strides to channels last.
template <class X>
void copy_line(const X* from, std::int64_t channel_stride, std::int64_t column_stride, std::int64_t width,
               std::int64_t channels, float* to) {
  if (channel_stride == 1) {
    for (std::int64_t x = 0; x < width; ++x) {
      const X* pixel = from + x * column_stride;
      std::int64_t c = 0;
      for (; c + L <= channels; c += L) store(to + x * channels + c, load(pixel + c));
      for (; c < channels; ++c) to[x * channels + c] = to_float(pixel[c]);
    }
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
        for (int j = 0; j < L; ++j) store(to + (x + j) * channels + c, block[j]);
      }
      for (; c < channels; ++c)
        for (int j = 0; j < L; ++j) to[(x + j) * channels + c] = to_float(from[c * channel_stride + x + j]);
    }
  }
  for (; x < width; ++x)
    for (std::int64_t c = 0; c < channels; ++c)
      to[x * channels + c] = to_float(from[c * channel_stride + x * column_stride]);
}

// Output pixels as rows of a layer. X is the type of the images, in and out; parameters are float32, always as panels.
template <class X>
class Pixels {
 public:
  using Element = float;
  using Output = X;
  static constexpr bool kPrepares = true;

  Pixels(const midl::Images& images, const X* x) : images_(images), x_(x) {
    const auto& m = images;
    lines_ = m.height + 2 * m.padding_y;
    in_place_ = sizeof(X) == 4 && m.channel_stride == 1 && m.column_stride == m.channels && !m.padding_x && !m.padding_y;
    line_stride_ = in_place_ ? m.row_stride : (m.width + 2 * m.padding_x) * m.channels;
    // Kernel columns lie side by side unless they are dilated.
    const bool joined = m.dilation_x == 1 || m.kernel_width == 1;
    runs_per_line_ = joined ? 1 : m.kernel_width;
    run_ = joined ? m.kernel_width * m.channels : m.channels;
    patches_ = m.kernel_height * runs_per_line_ > 1 && run_ < kShortSegment;
    depth_ = m.kernel_height * m.kernel_width * m.channels;
  }

  std::int64_t chunk_rows() const {
    return lesser(kChunkRows, round_up(divide_up(kChunkElements, images_.channels), kTileRows));
  }
  void make_room(Range chunk) {
    const Range band = lines_of(chunk);
    if (band.end - band.begin > room_lines_) room_lines_ = band.end - band.begin;
    if (chunk.end - chunk.begin > room_rows_) room_rows_ = chunk.end - chunk.begin;
  }
  void carve(Carver& memory) {
    band_ = memory.take<float>(in_place_ ? 0 : room_lines_ * line_stride_);
    row_ = memory.take<const float*>(room_rows_);
    patch_ = memory.take<float>(patches_ ? room_rows_ * depth_ : 0);
    const std::int64_t pieces = divide_up(run_, kDepthBlock);
    segments_ = patches_ ? divide_up(depth_, kDepthBlock) : images_.kernel_height * runs_per_line_ * pieces;
    segment_ = memory.take<Segment>(segments_);
    if (segment_) fill_segments();
  }

  void prepare(Range chunk, std::int64_t thread, std::int64_t threads) {
    const auto& m = images_;
    const Range band = lines_of(chunk);
    if (!in_place_) {
      const Range own = part_of(band.end - band.begin, thread, threads, 1);
      for (std::int64_t i = own.begin; i < own.end; ++i) fill_line(band.begin + i, band_ + i * line_stride_);
      if (patches_) {
#pragma omp barrier
      }
    }
    const Range rows = part_of(chunk.end - chunk.begin, thread, threads, 1);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      const std::int64_t row = chunk.begin + r, column = row % m.out_width, line = row / m.out_width;
      const float* first = in_place_ ? reinterpret_cast<const float*>(x_) + line / m.out_height * m.batch_stride +
                                           line % m.out_height * m.stride_y * line_stride_
                                     : band_ + (first_line(line) - band.begin) * line_stride_;
      first += column * m.stride_x * m.channels;
      row_[r] = patches_ ? copy_patch(first, patch_ + r * depth_) : first;
    }
  }
  const float* row(std::int64_t row, std::int64_t chunk_start) const { return row_[row - chunk_start]; }

  void multiply(const float* const* rows, std::int64_t m, const Neurons<float>& neurons, float*, float* out,
                std::int64_t ldo) const {
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < segments_; at += segment_[i++].length)
      panel_slice(rows, m, neurons.panel, depth_, at, neurons.count, segment_[i].start, segment_[i].length, nullptr, out,
                  ldo, i > 0);
  }
  void dot(const float* const* neurons, int count, const float* row, float* out) const {
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < segments_; at += segment_[i++].length)
      dot_block(neurons, count, row + (segment_[i].start - at), depth_, 1, at, segment_[i].length, out, 1, i > 0);
  }

 private:
  // Padded lines are numbered through all images; this is the first that an output line looks at.
  std::int64_t first_line(std::int64_t output_line) const {
    return output_line / images_.out_height * lines_ + output_line % images_.out_height * images_.stride_y;
  }
  Range lines_of(Range chunk) const {
    return {first_line(chunk.begin / images_.out_width),
            first_line((chunk.end - 1) / images_.out_width) + (images_.kernel_height - 1) * images_.dilation_y + 1};
  }
  void fill_line(std::int64_t line, float* to) const {
    const auto& m = images_;
    const std::int64_t y = line % lines_ - m.padding_y, margin = m.padding_x * m.channels;
    const bool inside = y >= 0 && y < m.height;
    const std::size_t zeros = std::size_t(inside ? margin : line_stride_) * sizeof(float);
    __builtin_memset(to, 0, zeros);
    if (!inside) return;
    copy_line(x_ + line / lines_ * m.batch_stride + y * m.row_stride, m.channel_stride, m.column_stride, m.width,
              m.channels, to + margin);
    __builtin_memset(to + line_stride_ - margin, 0, zeros);
  }
  const float* copy_patch(const float* first, float* to) const {
    float* next = to;
    for (std::int64_t y = 0; y < images_.kernel_height; ++y)
      for (std::int64_t i = 0; i < runs_per_line_; ++i, next += run_)
        copy_floats(first + y * images_.dilation_y * line_stride_ + i * images_.dilation_x * images_.channels, run_, next);
    return to;
  }
  void fill_segments() {
    Segment* next = segment_;
    const auto add = [&](std::int64_t start, std::int64_t length) {
      const std::int64_t step = round_up(divide_up(length, divide_up(length, kDepthBlock)), L);
      for (std::int64_t i = 0; i < length; i += step) *next++ = {start + i, lesser(step, length - i)};
    };
    if (patches_) {
      add(0, depth_);
    } else {
      for (std::int64_t y = 0; y < images_.kernel_height; ++y)
        for (std::int64_t i = 0; i < runs_per_line_; ++i)
          add(y * images_.dilation_y * line_stride_ + i * images_.dilation_x * images_.channels, run_);
    }
    segments_ = next - segment_;
  }

  midl::Images images_;
  const X* x_;
  bool in_place_, patches_;
  std::int64_t lines_, line_stride_, runs_per_line_, run_, depth_, segments_ = 0, room_lines_ = 0, room_rows_ = 0;
  float *band_ = nullptr, *patch_ = nullptr;
  const float** row_ = nullptr;
  Segment* segment_ = nullptr;
};

void convolution_forward(const midl::ConvolutionForward& call) {
  if (call.storage == midl::Storage::bfloat16)
    run_forward(call.rows, Pixels<bf16>(call.images, static_cast<const bf16*>(call.rows.x)));
  else
    run_forward(call.rows, Pixels<float>(call.images, static_cast<const float*>(call.rows.x)));
}

}  // namespace
