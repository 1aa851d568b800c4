// Forward pass of a layer: code; gate and selection; then, per block of neurons, light and full path.
//
// Rows are taken in chunks whose code and gate stay in cache. No mask and no copy of the input is made: the gate matrix
// (blocks x groups) tells each block of neurons which rows chose it, and those rows are addressed by pointer. Where a row
// lies in memory is the business of a source: PlainRows here, the pixels of images in convolution.hpp.
#pragma once

#include <omp.h>

#include <atomic>
#include <new>
#include <type_traits>

#include "arena.hpp"
#include "kernels.hpp"
#include "panel.hpp"
#include "picked.hpp"
#include "select.hpp"
#include "tiles.hpp"

namespace {

constexpr std::int64_t kChunkRows = 512;
// Where tile registers multiply, rows are read as fast as the second cache level gives them, so a chunk has to fit there.
constexpr std::int64_t kTileChunkElements = 512 * 1024, kLeastTileChunk = 64;
// Below this many multiply-adds a second thread costs more than it brings.
constexpr double kThreadWorth = 300e3;
// Up to this many rows, which one tile takes, a layer waits for memory: then threads read their part of light_up in one
// go, before the panels that were selected.
constexpr std::int64_t kLightFirstRows = panel_rows(2);
// Rows per thread from which the code is always dealt out by rows, and what makes shares of its columns even.
constexpr std::int64_t kColumnRows = 33;
constexpr double kEvenShares = 1.1;
// Below this many, every thread computes the gate for itself rather than wait for the others' share.
constexpr double kRepeatWorth = 100e3;

struct Range {
  std::int64_t begin, end;
};

// Part i of n items in `parts`, boundaries at multiples of `step`.
MIDL_INLINE Range part_of(std::int64_t n, std::int64_t i, std::int64_t parts, std::int64_t step) {
  const std::int64_t steps = divide_up(n, step);
  return {lesser(n, steps * i / parts * step), lesser(n, steps * (i + 1) / parts * step)};
}

// The size of the largest of them.
MIDL_INLINE std::int64_t largest_part(std::int64_t n, std::int64_t parts, std::int64_t step) {
  std::int64_t largest = 0;
  for (std::int64_t i = 0; i < parts; ++i) {
    const Range part = part_of(n, i, parts, step);
    if (part.end - part.begin > largest) largest = part.end - part.begin;
  }
  return largest;
}

// The threads that compute a chunk together.
struct Team {
  std::int64_t threads, thread;
  void wait() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

// Positions that share a selection: `span` neighbours within a sequence, the last block of a sequence may be short.
struct Blocks {
  std::int64_t positions, span, per_sequence, count;
  Blocks(std::int64_t rows, std::int64_t positions_, std::int64_t span_)
      : positions(positions_), span(span_), per_sequence(divide_up(positions_, span_)),
        count(positions_ ? rows / positions_ * per_sequence : 0) {}
  std::int64_t first_row(std::int64_t block) const {
    return block / per_sequence * positions + block % per_sequence * span;
  }
  std::int64_t block_of(std::int64_t row) const {
    return span == 1 ? row : row / positions * per_sequence + row % positions / span;
  }
};

// Neurons in blocks of at most kPanelWidth that hold whole groups or a part of one.
struct NeuronBlocks {
  std::int64_t group_size, groups, parts, groups_per_block, count;
  NeuronBlocks(std::int64_t groups_, std::int64_t group_size_)
      : group_size(group_size_), groups(groups_),
        parts(group_size_ > kPanelWidth ? divide_up(group_size_, kPanelWidth) : 1),
        groups_per_block(group_size_ > kPanelWidth ? 1 : kPanelWidth / group_size_),
        count(divide_up(groups_, groups_per_block) * parts) {}

  struct Block {
    std::int64_t first_group, end_group, first, size;  // of the neurons: first, size
  };
  Block operator[](std::int64_t i) const {
    const std::int64_t group = i / parts * groups_per_block;
    const std::int64_t end = lesser(groups, group + groups_per_block);
    if (parts == 1) return {group, end, group * group_size, (end - group) * group_size};
    const std::int64_t begin = i % parts * part_size();
    return {group, end, group * group_size + begin, lesser(part_size(), group_size - begin)};
  }
  std::int64_t part_size() const { return divide_up(group_size, parts); }
};

// Narrow groups (fewer neurons than fill a panel, even a folded one) have three forms. Sparse: dot products of the selected neurons, row by
// row. Dense: all neurons by panels, those not selected ignored; per multiply-add that costs kDotCost times less, but
// reads every weight, which only many rows repay. Picked, for neurons that several rows picked: dot products of the selected neurons, slice by
// slice, see picked.hpp.
enum class Narrow { sparse, dense, picked };
template <class T>
constexpr double kDotCost = kTiles && sizeof(T) == 2 ? 25 : 3.3;
constexpr std::int64_t kDenseRows = 8, kPickRows = 32;

template <class T>
MIDL_INLINE bool narrow(std::int64_t group_size) {
  return group_size < kPanelWorthNeurons<T>;
}
// Of the product of `rows` rows, each with elements `side_by_side`, with narrow groups of which each row selects some.
template <class T>
MIDL_INLINE Narrow narrow_form(std::int64_t rows, std::int64_t depth, std::int64_t groups, std::int64_t selected, bool side_by_side) {
  const bool densely = double(selected) * kDotCost<T> > double(groups);
  if (side_by_side && enough_picks<T>(rows, groups, selected) && (!densely || (rows >= kPickRows && few_picks<T>(depth, groups, selected))))
    return Narrow::picked;
  return densely && rows >= kDenseRows ? Narrow::dense : Narrow::sparse;
}

// With so many rows each, threads take whole chunks and never wait for each other, though each reads all weights. Where these are more
// than fit into the last cache, many threads would wait for them, and so would tile registers; shorter vectors gain nothing.
constexpr std::int64_t kApartRows = 64, kManyApartRows = 256, kApartThreads = 4;
constexpr double kApartWeights = 1 << 20;
template <class T>
bool works_apart(const midl::LinearForward& call, int threads) {
  const bool few = double(call.neurons) * double(call.depth) <= kApartWeights;
  const bool waits = L < 16 || (kTiles && sizeof(T) == 2);
  if (waits && !few) return false;
  const std::int64_t each = narrow<T>(call.neurons / call.groups) || waits ? 2 * kApartRows : kApartRows;
  return call.rows >= threads * (few || threads <= kApartThreads ? each : kManyApartRows);
}

// Where the panels of a layer lie, in elements; those of the light path and gate in one buffer, those of the weight in
// another: one per part of a group, or per block of neurons where groups are narrow.
template <class T>
struct PackedLayout {
  std::int64_t depth, rank, lanes;
  std::int64_t down, up, gate, light_size, weight_size;
  PackedLayout(std::int64_t depth_, std::int64_t rank_, const NeuronBlocks& blocks)
      : depth(packed_depth<T>(depth_)), rank(packed_depth<T>(rank_)) {
    const bool by_block = narrow<T>(blocks.group_size);
    lanes = by_block ? kPanelWidth : panel_lanes<T>(blocks.part_size());
    down = 0;
    up = down + round_up(rank, kPanelWidth) * depth;
    gate = up + blocks.count * kPanelWidth * rank;
    light_size = gate + round_up(blocks.groups, kPanelWidth) * rank;
    weight_size = (by_block ? blocks.count : blocks.groups * blocks.parts) * lanes * depth;
  }
  std::int64_t weight(std::int64_t panel) const { return panel * lanes * depth; }
};

// The light gate's group means of light_up keep float32's precision: bfloat16 panels don't hold them.
template <class T>
constexpr bool kGroupMeansPacked = sizeof(T) == 4;

// Of the rows of the code that the light path multiplies: half precision where there are dot products for it, which take
// a quarter of the time; the gate always has them in float32.
template <class T>
using Code = std::conditional_t<sizeof(T) != 4 && kDotPairs, T, float>;

// The rows of a matrix, float32 as they are, half precision widened once per chunk, not once per neuron, unless there are
// dot products for it. A source also says how its rows are multiplied, since their elements need not lie side by side.
template <class T>
class PlainRows {
 public:
  using Element = T;  // of the parameters
  using Output = T;
  static constexpr bool kPrepares = sizeof(T) != 4 && !kDotPairs;  // whether prepare() and a barrier must precede row()
  static constexpr bool kSideBySide = true;                        // the elements of a row

  explicit PlainRows(const midl::LinearForward& call)
      : x_(static_cast<const T*>(call.x)), stride_(call.x_stride), depth_(call.depth) {}

  std::int64_t chunk_rows() const {
    if constexpr (kTiles && sizeof(T) == 2) {
      const std::int64_t kept = kTileChunkElements / depth_ / kLeastTileChunk * kLeastTileChunk;
      return lesser(kChunkRows, kept < kLeastTileChunk ? kLeastTileChunk : kept);
    }
    return kChunkRows;
  }
  void make_room(Range chunk) {
    if (chunk.end - chunk.begin > room_) room_ = chunk.end - chunk.begin;
  }
  void carve(Carver& memory) {
    if (kPrepares) wide_ = memory.take<float>(room_ * depth_);
  }
  void prepare(Range chunk, Team team) {
    const Range own = part_of(chunk.end - chunk.begin, team.thread, team.threads, 1);
    for (std::int64_t r = own.begin; r < own.end; ++r) {
      const T* from = x_ + (chunk.begin + r) * stride_;
      float* to = wide_ + r * depth_;
      std::int64_t i = 0;
      for (; i + L <= depth_; i += L) store(to + i, load(from + i));
      for (; i < depth_; ++i) to[i] = to_float(from[i]);
    }
  }
  auto row(std::int64_t row, std::int64_t chunk_start) const {
    if constexpr (kPrepares)
      return const_cast<const float*>(wide_) + (row - chunk_start) * depth_;
    else
      return x_ + row * stride_;
  }
  // `consecutive` where the rows are those from rows[0] on.
  template <class Row>
  void multiply(const Row* const* rows, std::int64_t m, const Neurons<T>& neurons, float* slice, float* out,
                std::int64_t ldo, [[maybe_unused]] bool consecutive = false) const {
    if constexpr (kTiles && sizeof(T) == 2)
      multiply_tiles(rows, m, neurons, depth_, whole_steps(depth_, consecutive ? 2 * stride_ : 0), nullptr, slice, out, ldo);
    else
      multiply_neurons(rows, m, neurons, depth_, nullptr, slice, out, ldo);
  }
  // out[i] = neurons[i] . row
  template <class Row>
  void dot(const T* const* neurons, int count, const Row* row, float* out) const {
    dot_block(neurons, count, row, depth_, 1, 0, depth_, out, 1, false);
  }

 private:
  const T* x_;
  std::int64_t stride_, depth_, room_ = 0;
  float* wide_ = nullptr;
};

// Floats of a row of the gate matrix, which is read column by column: an odd number of cache lines, since rows a power of two
// apart would share a few cache sets.
MIDL_INLINE std::int64_t gate_row(std::int64_t groups) { return round_up(groups, kPanelWidth) + 16; }

// Multiply-adds of a call, roughly.
inline double forward_work(const midl::LinearForward& c) {
  const double full = c.full ? double(c.neurons) : double(c.selected_groups) * double(c.neurons / c.groups) * double(c.depth);
  return double(c.rows) * (double(c.rank) * double(c.depth + c.neurons) + full);
}

template <class Source>
struct ForwardPlan;
template <class Source>
void read_gate_bias(ForwardPlan<Source>& plan);

// Rows of y whose lines are fetched before they are written.
constexpr std::int64_t kRowsAhead = 32;

// Everything the phases of a call share.
template <class Source>
struct ForwardPlan {
  using T = typename Source::Element;
  const midl::LinearForward& call;
  Source source;
  Blocks blocks;
  NeuronBlocks neuron_blocks;
  PackedLayout<T> layout;
  const T *packed_light, *packed_weight;
  int threads;
  bool repeat_gate, light_first;
  Narrow form;  // of narrow groups
  std::int64_t group_size, code_stride, gate_stride, chunk_blocks, chunk_rows, row_parts;
  std::atomic<std::int64_t>* taken;  // items of compute_neurons, per chunk

  // Shared by the threads, for the chunk at hand. light_code is code or its rounded copy.
  Code<T>* light_code;
  float *code, *block_code, *gate, *gate_weight, *gate_bias;
  float* light;  // of all neurons where it comes first: (blocks of neurons, rows, kPanelWidth)

  // Chunks are computed by `team` threads together and number a multiple of `chunk_step`.
  ForwardPlan(const midl::LinearForward& c, const Source& rows, int team, std::int64_t chunk_step)
      : call(c), source(rows), blocks(c.rows, c.positions, c.span), neuron_blocks(c.groups, c.neurons / c.groups),
        layout(c.depth, c.rank, neuron_blocks), packed_light(static_cast<const T*>(c.packed_light)),
        packed_weight(static_cast<const T*>(c.packed_weight)) {
    group_size = c.neurons / c.groups;
    code_stride = round_up(c.rank, kPanelWidth);
    gate_stride = gate_row(c.groups);
    threads = team;
    repeat_gate = threads > 1 && double(blocks.count) * double(c.groups) * double(c.rank) < kRepeatWorth;
    const std::int64_t chunks = round_up(divide_up(c.rows, source.chunk_rows()), chunk_step);
    chunk_blocks = divide_up(blocks.count, chunks);
    chunk_rows = 0;
    for (std::int64_t b = 0; b < blocks.count; b += chunk_blocks) {
      const Range chunk{blocks.first_row(b), last_row(b)};
      source.make_room(chunk);
      if (chunk.end - chunk.begin > chunk_rows) chunk_rows = chunk.end - chunk.begin;
    }
    // Enough items to even out what the rows chose, but never a few rows each.
    row_parts = divide_up(4 * threads, neuron_blocks.count);
    row_parts = lesser(row_parts, divide_up(chunk_rows, 4 * kTileRows));
    if (threads == 1) row_parts = 1;
    light_first = chunk_rows <= kLightFirstRows;
    form = narrow_form<T>(c.rows, c.depth, c.groups, c.selected_groups, Source::kSideBySide);
  }
  std::int64_t chunks() const { return divide_up(blocks.count, chunk_blocks); }
  // Of a block of neurons that fill panels.
  std::int64_t first_panel(std::int64_t index) const {
    return index / neuron_blocks.parts * neuron_blocks.groups_per_block * neuron_blocks.parts + index % neuron_blocks.parts;
  }
  // interpolate() goes by whole vectors, which may reach beyond the last group: no other thread's block may lie there.
  std::int64_t light_floats() const { return chunk_rows * kPanelWidth + L; }
  float* light_of(std::int64_t index) const { return light + index * light_floats(); }
  std::int64_t end_block(std::int64_t first) const { return lesser(first + chunk_blocks, blocks.count); }
  std::int64_t last_row(std::int64_t first) const {
    const std::int64_t end = end_block(first);
    return end == blocks.count ? call.rows : blocks.first_row(end);
  }

  void carve(Carver& memory) {
    code = memory.take<float>(chunk_rows * code_stride);
    if constexpr (sizeof(*light_code) == sizeof(*code))
      light_code = code;
    else
      light_code = memory.take<Code<T>>(chunk_rows * code_stride);
    block_code = call.span > 1 ? memory.take<float>(chunk_blocks * code_stride) : code;
    gate = memory.take<float>(chunk_blocks * gate_stride);
    gate_weight = call.gate_weight || (packed_light && kGroupMeansPacked<T>) ? nullptr : memory.take<float>(call.groups * call.rank);
    gate_bias = memory.take<float>(gate_stride);
    light = light_first ? memory.take<float>(neuron_blocks.count * light_floats()) : nullptr;
    taken = memory.take<std::atomic<std::int64_t>>(chunks());
    source.carve(memory);
  }
  // Take the memory that carve() measured and fill what does not depend on the rows.
  void settle(char* memory) {
    Carver carver(memory);
    carve(carver);
    for (std::int64_t i = 0; i < chunks(); ++i) new (taken + i) std::atomic<std::int64_t>(0);
    read_gate_bias(*this);
  }
};

// What one thread needs for itself.
struct ThreadMemory {
  const void** rows;  // as row_pointers() says
  const void** light_rows;  // of light_code
  const float** code_rows;
  std::int32_t* members;
  float* weights;
  float *slice, *light, *full, *bias;
  std::int32_t *keys, *picks;
  float* gate;  // of the chunk: the plan's, or this thread's own where the gate is computed by every thread
  std::uint32_t* masks;  // of the rows, which of some neurons they selected, where these are picked
  float* sums;

  template <class S>
  ThreadMemory(Carver& memory, const ForwardPlan<S>& plan) {
    const auto& c = plan.call;
    rows = memory.take<const void*>(plan.chunk_rows);
    code_rows = memory.take<const float*>(plan.chunk_rows);
    light_rows = memory.take<const void*>(plan.chunk_rows);
    members = memory.take<std::int32_t>(plan.chunk_rows);
    weights = memory.take<float>(plan.chunk_rows);
    slice = memory.take<float>(slice_floats());
    light = memory.take<float>(plan.light_floats());
    full = memory.take<float>(plan.light_floats());
    bias = memory.take<float>(kPanelWidth + L);
    keys = memory.take<std::int32_t>(round_up(c.groups, L));
    picks = memory.take<std::int32_t>(round_up(c.groups, L));
    gate = memory.take<float>(plan.repeat_gate ? plan.chunk_blocks * plan.gate_stride : 0);
    if (!plan.repeat_gate) gate = plan.gate;
    const bool picks = narrow<typename S::Element>(plan.group_size) && plan.form == Narrow::picked;
    masks = memory.take<std::uint32_t>(picks ? plan.chunk_rows : 0);
    sums = memory.take<float>(picks ? kPickedSums : 0);
  }
};

// Pointers to input rows, of the type that the source has them in.
template <class S>
auto row_pointers(const ForwardPlan<S>& plan, const ThreadMemory& memory) {
  return reinterpret_cast<decltype(plan.source.row(0, 0))*>(memory.rows);
}

template <class W>
Neurons<W> neurons_at(const W* plain, std::int64_t stride, const W* packed, std::int64_t offset, std::int64_t count,
                      std::int64_t next = -1) {
  return {plain, stride, packed ? packed + offset : nullptr, int(count), packed && next >= 0 ? packed + next : nullptr};
}

// The light gate is a projection by the group means of light_up, with the group means of the bias.
template <class T, class P>
void average_light_up(const T* up, std::int64_t rank, std::int64_t group_size, Range groups, P* mean) {
  for (std::int64_t g = groups.begin; g < groups.end; ++g) {
    for (std::int64_t i = 0; i < rank; ++i) {
      float total = 0;
      for (std::int64_t j = g * group_size; j < (g + 1) * group_size; ++j) total += to_float(up[j * rank + i]);
      store_as(mean + g * rank + i, total / float(group_size));
    }
  }
}

template <class S>
void read_gate_bias(ForwardPlan<S>& plan) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const T* from = static_cast<const T*>(c.gate_weight ? c.gate_bias : c.bias);
  const std::int64_t size = c.gate_weight ? 1 : plan.group_size;
  for (std::int64_t g = 0; g < plan.gate_stride; ++g) {
    float total = 0;
    if (from && g < c.groups)
      for (std::int64_t j = g * size; j < (g + 1) * size; ++j) total += to_float(from[j]);
    plan.gate_bias[g] = total / float(size);
  }
}

template <class S>
void compute_code(const ForwardPlan<S>& plan, ThreadMemory& memory, Range rows, Range columns,
                  std::int64_t chunk_start) {
  using T = typename S::Element;
  const auto& c = plan.call;
  if (rows.begin == rows.end) return;
  const auto pointers = row_pointers(plan, memory);
  for (std::int64_t r = rows.begin; r < rows.end; ++r) pointers[r - rows.begin] = plan.source.row(r, chunk_start);
  const T* down = static_cast<const T*>(c.light_down);
  for (std::int64_t i = columns.begin; i < columns.end; i += kPanelWidth)
    plan.source.multiply(pointers, rows.end - rows.begin,
                         neurons_at(down + i * c.depth, c.depth, plan.packed_light, plan.layout.down + i * plan.layout.depth,
                                    lesser(kPanelWidth, columns.end - i),
                                    i + kPanelWidth < columns.end ? plan.layout.down + (i + kPanelWidth) * plan.layout.depth : -1),
                         memory.slice, plan.code + (rows.begin - chunk_start) * plan.code_stride + i,
                         plan.code_stride, true);
  if constexpr (sizeof(*plan.light_code) != sizeof(*plan.code))
    for (std::int64_t r = rows.begin - chunk_start; r < rows.end - chunk_start; ++r)
      for (std::int64_t i = columns.begin; i < columns.end; i += L)
        store_as(plan.light_code + r * plan.code_stride + i, load(plan.code + r * plan.code_stride + i));
  if constexpr (kTiles && sizeof(T) == 2)
    if (columns.end == c.rank)  // tile registers multiply them, by zeros
      for (std::int64_t r = rows.begin - chunk_start; r < rows.end - chunk_start; ++r)
        __builtin_memset(plan.light_code + r * plan.code_stride + c.rank, 0, std::size_t(2 * (plan.code_stride - c.rank)));
}

template <class S>
void average_code(const ForwardPlan<S>& plan, Range blocks, std::int64_t chunk_block, std::int64_t chunk_start) {
  const auto& c = plan.call;
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b) {
    const std::int64_t first = plan.blocks.first_row(b);
    const std::int64_t end = b + 1 == plan.blocks.count ? c.rows : plan.blocks.first_row(b + 1);
    float* mean = plan.block_code + (b - chunk_block) * plan.code_stride;
    for (std::int64_t i = 0; i < c.rank; ++i) {
      float total = 0;
      for (std::int64_t r = first; r < end; ++r) total += plan.code[(r - chunk_start) * plan.code_stride + i];
      mean[i] = total / float(end - first);
    }
  }
}

template <class S, class G>
void compute_logits(const ForwardPlan<S>& plan, ThreadMemory& memory, const G* gate_weight, const G* packed,
                    Range blocks, Range groups) {
  const auto& c = plan.call;
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b)
    memory.code_rows[b - blocks.begin] = plan.block_code + b * plan.code_stride;
  for (std::int64_t g = groups.begin; g < groups.end; g += kPanelWidth)
    multiply_neurons(memory.code_rows, blocks.end - blocks.begin,
                     neurons_at(gate_weight + g * c.rank, c.rank, packed, plan.layout.gate + g * plan.layout.rank,
                                lesser(kPanelWidth, groups.end - g)),
                     c.rank, plan.gate_bias + g, memory.slice, memory.gate + blocks.begin * plan.gate_stride + g,
                     plan.gate_stride);
}

template <class S>
void select_groups(const ForwardPlan<S>& plan, ThreadMemory& memory, Range blocks, std::int64_t chunk_block) {
  // Threads that repeat the gate write the same selection.
  const auto& c = plan.call;
  const Rule rule(c.selected_groups, c.groups, c.threshold, c.hard);
  for (std::int64_t b = blocks.begin; b < blocks.end; ++b) {
    const std::int64_t block = chunk_block + b;
    float* gate = memory.gate + b * plan.gate_stride;
    select_row(gate, c.noise ? c.noise + block * c.groups : nullptr, c.groups, rule, memory.keys,
               memory.picks, c.selected ? c.selected + block * c.selected_groups : nullptr, gate);
  }
}

// The rows of a range that selected a group, with their interpolation weights.
template <class S>
std::int64_t gather_members(const ForwardPlan<S>& plan, std::int64_t group, Range rows, std::int64_t chunk_block,
                            std::int64_t chunk_start, ThreadMemory& memory) {
  const float* gate = memory.gate + group;
  std::int64_t count = 0;
  if (plan.call.span == 1) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      const float weight = gate[(r - chunk_start) * plan.gate_stride];
      memory.members[count] = std::int32_t(r - rows.begin);
      memory.weights[count] = weight;
      count += is_selected(weight);
    }
  } else {
    for (std::int64_t b = chunk_block; b < plan.end_block(chunk_block); ++b) {
      const float weight = gate[(b - chunk_block) * plan.gate_stride];
      if (!is_selected(weight)) continue;
      const std::int64_t first = plan.blocks.first_row(b);
      const std::int64_t end = lesser(rows.end, b + 1 == plan.blocks.count ? plan.call.rows : plan.blocks.first_row(b + 1));
      for (std::int64_t r = first < rows.begin ? rows.begin : first; r < end; ++r) {
        memory.members[count] = std::int32_t(r - rows.begin);
        memory.weights[count++] = weight;
      }
    }
  }
  const auto pointers = row_pointers(plan, memory);
  for (std::int64_t i = 0; i < count; ++i)
    pointers[i] = plan.source.row(rows.begin + memory.members[i], chunk_start);
  return count;
}

// y = l + a (f - l) + b where selected, l + b elsewhere; `light` holds l + b.
void interpolate(const ThreadMemory& memory, std::int64_t count, std::int64_t offset, std::int64_t size) {
  const float* bias = memory.bias + offset;
  std::int32_t lanes[L];
  for (int lane = 0; lane < L; ++lane) lanes[lane] = lane;
  const IVec in_tail = load(lanes) < splat(std::int32_t(size % L));
  for (std::int64_t i = 0; i < count; ++i) {
    float* light = memory.light + memory.members[i] * kPanelWidth + offset;
    const float* full = memory.full + i * kPanelWidth;
    const Vec weight = splat(memory.weights[i]);
    std::int64_t j = 0;
    for (; j + L <= size; j += L) {
      const Vec l = load(light + j);
      store(light + j, l + weight * (load(full + j) + load(bias + j) - l));
    }
    if (j < size) {
      // What lies behind the group is stored as it was.
      const Vec l = load(light + j), mixed = l + weight * (load(full + j) + load(bias + j) - l);
      store(light + j, in_tail ? mixed : l);
    }
  }
}

// Groups that fill panels: each against the rows that selected it.
template <class S>
void mix_groups(const ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t index, std::int64_t next, Range rows,
                std::int64_t chunk_block, std::int64_t chunk_start) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  const std::int64_t size = lesser(block.size, plan.group_size), parts = plan.neuron_blocks.parts;
  for (std::int64_t g = block.first_group; g < block.end_group; ++g) {
    const std::int64_t offset = (g - block.first_group) * plan.group_size;
    const std::int64_t panel = g * parts + index % parts;
    const std::int64_t next_panel = g + 1 < block.end_group ? panel + parts : next < 0 ? -1 : plan.first_panel(next);
    const std::int64_t count = gather_members(plan, g, rows, chunk_block, chunk_start, memory);
    if (count == 0) continue;
    plan.source.multiply(row_pointers(plan, memory), count,
                         neurons_at(static_cast<const T*>(c.weight) + (block.first + offset) * c.depth, c.depth,
                                    plan.packed_weight, plan.layout.weight(panel), size,
                                    plan.layout.weight(next_panel)),
                         memory.slice, memory.full, kPanelWidth);
    interpolate(memory, count, offset, size);
  }
}

// Spreads a row's gate, one weight per group, over `count` <= kPanelWidth neurons from `first` on; `rest` behind them.
class GateSpread {
 public:
  GateSpread(std::int64_t first, std::int64_t count, std::int64_t group_size, float rest)
      : group_size_(group_size), count_(count), group_(first / group_size), left_((group_ + 1) * group_size - first), rest_(rest),
        copies_(group_size == 1 && count == kPanelWidth) {
#ifdef __AVX512F__
    if (copies_) return;
    std::int32_t groups[kPanelWidth] = {};
    each_run([&](std::int64_t group, std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; ++j) groups[j] = std::int32_t(group);
    });
    for (int v = 0; v < kVectors; ++v) {
      from_[v] = groups[v * L];
      index_[v] = load(groups + v * L) - from_[v];
      const std::int64_t inside = count - v * L;
      inside_[v] = __mmask16(inside >= L ? 0xffff : inside > 0 ? (1 << inside) - 1 : 0);
    }
#endif
  }
  void operator()(const float* gate, float* weights) const {
    if (copies_) {
      for (int v = 0; v < kPanelWidth; v += L) store(weights + v, load(gate + group_ + v));
      return;
    }
#ifdef __AVX512F__
    for (int v = 0; v < kVectors; ++v)
      store(weights + v * L, (Vec)_mm512_mask_permutexvar_ps((__m512)splat(rest_), inside_[v], (__m512i)index_[v],
                                                             (__m512)load(gate + from_[v])));
#else
    each_run([&](std::int64_t group, std::int64_t begin, std::int64_t end) {
      for (std::int64_t j = begin; j < end; ++j) weights[j] = gate[group];
    });
    for (std::int64_t j = count_; j < kPanelWidth; ++j) weights[j] = rest_;
#endif
  }

 private:
  // The neurons [begin, end) of each group.
  template <class Visit>
  MIDL_INLINE void each_run(const Visit& visit) const {
    std::int64_t group = group_, begin = 0;
    for (std::int64_t end = left_; begin < count_; begin = end, end += group_size_) visit(group++, begin, lesser(end, count_));
  }

  std::int64_t group_size_, count_, group_, left_;
  float rest_;
  bool copies_;
#ifdef __AVX512F__
  static constexpr int kVectors = kPanelWidth / L;
  IVec index_[kVectors];
  std::int32_t from_[kVectors];
  __mmask16 inside_[kVectors];
#endif
};

// Narrow groups, many to a block of neurons: see Narrow.
template <class S>
void mix_narrow_groups(const ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t index, std::int64_t next,
                       Range rows, std::int64_t chunk_block, std::int64_t chunk_start) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  const T* weight = static_cast<const T*>(c.weight) + block.first * c.depth;
  const std::int64_t m = rows.end - rows.begin;
  const auto pointers = row_pointers(plan, memory);
  for (std::int64_t r = 0; r < m; ++r) pointers[r] = plan.source.row(rows.begin + r, chunk_start);
  float weights[kPanelWidth];
  const GateSpread spread(block.first, block.size, plan.group_size, kUnselected);
  const auto read_weights = [&](std::int64_t r) {
    spread(memory.gate + (plan.blocks.block_of(rows.begin + r) - chunk_block) * plan.gate_stride, weights);
  };
  if (plan.form == Narrow::dense) {
    plan.source.multiply(pointers, m,
                         neurons_at(weight, c.depth, plan.packed_weight, plan.layout.weight(index), block.size,
                                    plan.layout.weight(next)),
                         memory.slice, memory.full, kPanelWidth, true);
  } else if constexpr (kPicks<T> && S::kSideBySide) {
    if (plan.form == Narrow::picked) {
      for (std::int64_t r = 0; r < m; ++r) {
        read_weights(r);
        memory.masks[r] = selected_bits(weights);
      }
      const T* after = next < 0 ? nullptr : static_cast<const T*>(c.weight) + plan.neuron_blocks[next].first * c.depth;
      dot_picked(pointers, memory.masks, m, weight, c.depth, int(block.size), c.depth, memory.slice, memory.sums, memory.full, after);
    }
  }
  for (std::int64_t r = 0; r < m; ++r) {
    float* light = memory.light + r * kPanelWidth;
    read_weights(r);
    if (plan.form != Narrow::sparse) {
      const float* full = memory.full + r * kPanelWidth;
      for (int j = 0; j < kPanelWidth; j += L) {
        const Vec weight = load(weights + j), l = load(light + j);
        const Vec mixed = l + weight * (load(full + j) + load(memory.bias + j) - l);
        store(light + j, weight < 0.0f ? l : mixed);
      }
      continue;
    }
    const T* neurons[kPanelWidth] = {};
    int picks[kPanelWidth], count = 0;
    for (int j = 0; j < kPanelWidth; ++j) {
      picks[count] = j;
      count += is_selected(weights[j]);
    }
    float full[kPanelWidth];
    for (int i = 0; i < count; ++i) neurons[i] = weight + picks[i] * c.depth;
    plan.source.dot(neurons, count, pointers[r], full);
    for (int i = 0; i < count; ++i)
      light[picks[i]] += weights[picks[i]] * (full[i] + memory.bias[picks[i]] - light[picks[i]]);
  }
}

// The caller has computed the full path: each row takes what it selected.
template <class S>
void mix_computed(const ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t index, Range rows,
                  std::int64_t chunk_block) {
  const auto& c = plan.call;
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  const GateSpread spread(block.first, block.size, plan.group_size, kUnselected);
  for (std::int64_t r = rows.begin; r < rows.end; ++r) {
    const float* gate = memory.gate + (plan.blocks.block_of(r) - chunk_block) * plan.gate_stride;
    const auto* full = static_cast<const typename S::Output*>(c.full) + r * c.neurons + block.first;
    float* light = memory.light + (r - rows.begin) * kPanelWidth;
    float weights[kPanelWidth];
    spread(gate, weights);
    std::int64_t j = 0;
    for (; j + L <= block.size; j += L) {
      const Vec weight = load(weights + j), l = load(light + j);
      const Vec mixed = l + weight * (load(full + j) + load(memory.bias + j) - l);
      store(light + j, weight < 0.0f ? l : mixed);
    }
    for (; j < block.size; ++j)
      if (is_selected(weights[j])) light[j] += weights[j] * (to_float(full[j]) + memory.bias[j] - light[j]);
  }
}

template <class S>
void read_bias(const ForwardPlan<S>& plan, ThreadMemory& memory, const NeuronBlocks::Block& block) {
  const auto* bias = static_cast<const typename S::Element*>(plan.call.bias);
  for (int j = 0; j < kPanelWidth; ++j)
    memory.bias[j] = bias && j < block.size ? to_float(bias[block.first + j]) : 0.0f;
}

// The light path of a block of neurons, with their bias, which memory.bias gets. Tiles fetch the panel of the block `next`.
template <class S>
void compute_light(const ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t index, std::int64_t next, Range rows,
                   std::int64_t chunk_start) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  read_bias(plan, memory, block);
  const auto light_rows = reinterpret_cast<const Code<T>**>(memory.light_rows);
  for (std::int64_t r = rows.begin; r < rows.end; ++r)
    light_rows[r - rows.begin] = plan.light_code + (r - chunk_start) * plan.code_stride;
  const auto neurons = neurons_at(static_cast<const T*>(c.light_up) + block.first * c.rank, c.rank, plan.packed_light,
                                  plan.layout.up + index * kPanelWidth * plan.layout.rank, block.size,
                                  next < 0 ? -1 : plan.layout.up + next * kPanelWidth * plan.layout.rank);
  if constexpr (kTiles && sizeof(T) == 2)
    multiply_tiles(light_rows, rows.end - rows.begin, neurons, c.rank,
                   whole_steps(round_up(c.rank, kTileDepth), 2 * plan.code_stride), memory.bias, memory.slice, memory.light,
                   kPanelWidth);
  else
    multiply_neurons(light_rows, rows.end - rows.begin, neurons, c.rank, memory.bias, memory.slice, memory.light, kPanelWidth);
}

template <class S>
void compute_neurons(const ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t index, std::int64_t next, Range rows,
                     std::int64_t chunk_block, std::int64_t chunk_start) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  const std::int64_t m = rows.end - rows.begin;
  using Output = typename S::Output;
  Output* y = static_cast<Output*>(c.y) + rows.begin * c.neurons + block.first;
  // Lines of y lie far apart.
  const auto fetch = [&](std::int64_t r) {
    __builtin_prefetch(y + r * c.neurons, 0, 2);
    if constexpr (sizeof(Output) == 4) __builtin_prefetch(y + r * c.neurons + 16, 0, 2);
  };
  if (plan.light_first) {
    memory.light = plan.light_of(index);
    read_bias(plan, memory, block);
  } else {
    compute_light(plan, memory, index, next, rows, chunk_start);
  }

  for (std::int64_t r = 0; r < lesser(m, kRowsAhead); ++r) fetch(r);
  if (c.full)
    mix_computed(plan, memory, index, rows, chunk_block);
  else if (narrow<T>(plan.group_size))
    mix_narrow_groups(plan, memory, index, next, rows, chunk_block, chunk_start);
  else
    mix_groups(plan, memory, index, next, rows, chunk_block, chunk_start);

  for (std::int64_t r = 0; r < m; ++r) {
    const float* from = memory.light + r * kPanelWidth;
    Output* to = y + r * c.neurons;
    if (r + kRowsAhead < m) fetch(r + kRowsAhead);
    std::int64_t j = 0;
    if (c.relu) {
      // NaN stays.
      for (; j + L <= block.size; j += L) {
        const Vec v = load(from + j);
        store_as(to + j, v < 0.0f ? Vec{} : v);
      }
      for (; j < block.size; ++j) store_as(to + j, from[j] < 0 ? 0.0f : from[j]);
      continue;
    }
    for (; j + L <= block.size; j += L) store_as(to + j, load(from + j));
    for (; j < block.size; ++j) store_as(to + j, from[j]);
  }
}

// Whether one of the chunk's `count` blocks of rows selected one of a block of neurons.
template <class S>
bool is_wanted(const ForwardPlan<S>& plan, const ThreadMemory& memory, std::int64_t index, std::int64_t count) {
  const NeuronBlocks::Block block = plan.neuron_blocks[index];
  for (std::int64_t b = 0; b < count; ++b)
    for (std::int64_t g = block.first_group; g < block.end_group; ++g)
      if (is_selected(memory.gate[b * plan.gate_stride + g])) return true;
  return plan.call.full != nullptr;
}

template <class S>
void average_gate(const ForwardPlan<S>& plan, Team team) {
  using T = typename S::Element;
  const auto& c = plan.call;
  if (plan.gate_weight)
    average_light_up(static_cast<const T*>(c.light_up), c.rank, plan.group_size,
                     part_of(c.groups, team.thread, team.threads, 1), plan.gate_weight);
}

// All phases for the chunk that begins with block `first`; the threads may leave it one after the other.
template <class S>
void forward_chunk(ForwardPlan<S>& plan, ThreadMemory& memory, std::int64_t first, Team team) {
  using T = typename S::Element;
  const auto& c = plan.call;
  const std::int64_t start = plan.blocks.first_row(first), end = plan.last_row(first);
  const std::int64_t rows = end - start, count = plan.end_block(first) - first;
  const auto shift = [](Range r, std::int64_t by) { return Range{r.begin + by, r.end + by}; };

  if constexpr (S::kPrepares) {
    plan.source.prepare({start, end}, team);
    team.wait();
  }
  // Many rows are dealt out by rows, few rows by columns of the code, so that each thread reads its share of light_down alone; of
  // neither few nor many, by columns where their shares are even.
  const double columns = double(largest_part(c.rank, team.threads, kPanelWidth) * team.threads) / double(c.rank);
  const bool by_rows = rows >= team.threads * (columns < kEvenShares ? kColumnRows : kTileRows);
  compute_code(plan, memory, by_rows ? shift(part_of(rows, team.thread, team.threads, kTileRows), start) : Range{start, end},
               by_rows ? Range{0, c.rank} : part_of(c.rank, team.thread, team.threads, kPanelWidth), start);
  team.wait();
  if (c.span > 1) {
    average_code(plan, shift(part_of(count, team.thread, team.threads, 1), first), first, start);
    team.wait();
  }
  const bool by_blocks = plan.repeat_gate || count >= team.threads;
  const Range all_blocks{0, count};
  const Range own_blocks = plan.repeat_gate ? all_blocks : part_of(count, team.thread, team.threads, 1);
  const Range own_groups = by_blocks ? Range{0, c.groups} : part_of(c.groups, team.thread, team.threads, kPanelWidth);
  const Range logit_blocks = by_blocks ? own_blocks : all_blocks;
  if (plan.gate_weight)
    compute_logits(plan, memory, plan.gate_weight, static_cast<const float*>(nullptr), logit_blocks, own_groups);
  else
    compute_logits(plan, memory, static_cast<const T*>(c.gate_weight), plan.packed_light, logit_blocks, own_groups);
  if (!by_blocks) team.wait();
  select_groups(plan, memory, own_blocks, first);
  if (plan.light_first) {
    const Range own = part_of(plan.neuron_blocks.count, team.thread, team.threads, 1);
    for (std::int64_t i = own.begin; i < own.end; ++i) {
      memory.light = plan.light_of(i);
      compute_light(plan, memory, i, -1, {start, end}, start);
    }
  }
  if (!plan.repeat_gate || plan.light_first) team.wait();
  // Items are taken one ahead, so that a thread knows which panel to fetch while it is busy with another.
  const std::int64_t items = plan.neuron_blocks.count * plan.row_parts;
  auto& taken = plan.taken[first / plan.chunk_blocks];
  const auto rows_of = [&](std::int64_t i) {
    return shift(part_of(rows, i % plan.row_parts, plan.row_parts, kTileRows), start);
  };
  const auto take = [&] {
    for (;;) {
      const std::int64_t i = taken.fetch_add(1, std::memory_order_relaxed);
      if (i >= items || !plan.light_first || is_wanted(plan, memory, i / plan.row_parts, count)) return i;
      // Nothing to multiply, so the panel is not the next one.
      compute_neurons(plan, memory, i / plan.row_parts, -1, rows_of(i), first, start);
    }
  };
  for (std::int64_t i = take(), next; i < items; i = next) {
    next = take();
    compute_neurons(plan, memory, i / plan.row_parts, next < items ? next / plan.row_parts : -1,
                    rows_of(i), first, start);
  }
}

template <class Source>
void run_forward(const midl::LinearForward& call, const Source& source) {
  if (call.rows == 0) return;
  const int threads = forward_work(call) < kThreadWorth ? 1 : call.threads;
  const bool apart = threads > 1 && works_apart<typename Source::Element>(call, threads) &&
                     call.rows / call.positions * divide_up(call.positions, call.span) >= threads;
  ForwardPlan<Source> plan(call, source, apart ? 1 : threads, apart ? threads : 1);
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  ThreadMemory measure(own, plan);
  const std::size_t common = shared.used(), each = own.used();

  if (apart) {
    char* memory = midl::scratch((common + each) * std::size_t(threads));
    std::atomic<std::int64_t> taken(0);
#pragma omp parallel num_threads(threads)
    {
      ForwardPlan<Source> mine(plan);
      char* base = memory + (common + each) * std::size_t(omp_get_thread_num());
      mine.settle(base);
      Carver carver(base + common);
      ThreadMemory own_memory(carver, mine);
      [[maybe_unused]] const TilesFor<typename Source::Element> tiles;
      average_gate(mine, {1, 0});
      for (std::int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < mine.chunks();)
        forward_chunk(mine, own_memory, i * mine.chunk_blocks, {1, 0});
    }
    return;
  }
  char* memory = midl::scratch(common + each * std::size_t(threads));
  plan.settle(memory);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // The runtime may give fewer threads than asked for, in a nested region for instance.
    const Team team{omp_get_num_threads(), omp_get_thread_num()};
    Carver carver(memory + common + each * std::size_t(team.thread));
    ThreadMemory own_memory(carver, plan);
    [[maybe_unused]] const TilesFor<typename Source::Element> tiles;
    average_gate(plan, team);
    for (std::int64_t first = 0; first < plan.blocks.count; first += plan.chunk_blocks) {
      forward_chunk(plan, own_memory, first, team);
      if (plan.end_block(first) < plan.blocks.count) team.wait();
    }
  }
}

void linear_forward(const midl::LinearForward& call) {
  if (call.storage == midl::Storage::bfloat16)
    run_forward(call, PlainRows<bf16>(call));
  else
    run_forward(call, PlainRows<float>(call));
}

template <class T>
void pack_light(const midl::LinearPack& call, const NeuronBlocks& blocks, const PackedLayout<T>& layout) {
  const std::int64_t rank = call.rank, depth = call.depth;
  T* packed = static_cast<T*>(call.packed_light);
  const auto* down = static_cast<const T*>(call.light_down);
  const auto* up = static_cast<const T*>(call.light_up);
  const auto* gate = static_cast<const T*>(call.gate_weight);
  if (!gate && kGroupMeansPacked<T>) {
    T* mean = reinterpret_cast<T*>(midl::scratch(std::size_t(call.groups * rank) * sizeof(T)));
    average_light_up(up, rank, blocks.group_size, Range{0, call.groups}, mean);
    gate = mean;
  }
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < rank; i += kPanelWidth)
      pack_panel(down + i * depth, depth, int(lesser(kPanelWidth, rank - i)), depth, packed + layout.down + i * layout.depth);
    if (gate) {
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < call.groups; i += kPanelWidth)
        pack_panel(gate + i * rank, rank, int(lesser(kPanelWidth, call.groups - i)), rank,
                   packed + layout.gate + i * layout.rank);
    }
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < blocks.count; ++i)
      pack_panel(up + blocks[i].first * rank, rank, int(blocks[i].size), rank,
                 packed + layout.up + i * kPanelWidth * layout.rank);
  }
}

template <class T>
void pack_weight(const midl::LinearPack& call, const NeuronBlocks& blocks, const PackedLayout<T>& layout) {
  const std::int64_t depth = call.depth;
  T* packed = static_cast<T*>(call.packed_weight);
  const auto* weight = static_cast<const T*>(call.weight);
  const bool by_block = narrow<T>(blocks.group_size);
  const std::int64_t panels = by_block ? blocks.count : call.groups * blocks.parts;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1)
  for (std::int64_t i = 0; i < panels; ++i) {
    const std::int64_t begin = i % blocks.parts * blocks.part_size();
    const std::int64_t first = by_block ? blocks[i].first : i / blocks.parts * blocks.group_size + begin;
    const std::int64_t size = by_block ? blocks[i].size : lesser(blocks.part_size(), blocks.group_size - begin);
    pack_panel(weight + first * depth, depth, int(size), depth, packed + layout.weight(i));
  }
}

template <class T>
void run_pack(const midl::LinearPack& call) {
  const NeuronBlocks blocks(call.groups, call.neurons / call.groups);
  const PackedLayout<T> layout(call.depth, call.rank, blocks);
  if (call.packed_light) pack_light<T>(call, blocks, layout);
  if (call.packed_weight) pack_weight<T>(call, blocks, layout);
}

midl::PackedSizes packed_sizes(const midl::LinearPack& call) {
  const auto sizes = [&](auto layout) { return midl::PackedSizes{layout.light_size, layout.weight_size}; };
  const NeuronBlocks blocks(call.groups, call.neurons / call.groups);
  return call.storage == midl::Storage::bfloat16 ? sizes(PackedLayout<bf16>(call.depth, call.rank, blocks))
                                                 : sizes(PackedLayout<float>(call.depth, call.rank, blocks));
}

bool wants_weight_panels(midl::Storage storage, std::int64_t rows, std::int64_t depth, std::int64_t groups, std::int64_t selected,
                         std::int64_t group_size, bool convolution) {
  const auto wants = [&](auto element) {
    using T = decltype(element);
    return !narrow<T>(group_size) || narrow_form<T>(rows, depth, groups, selected, !convolution) == Narrow::dense;
  };
  return storage == midl::Storage::bfloat16 ? wants(bf16{}) : wants(float{});
}

void pack(const midl::LinearPack& call) {
  if (call.storage == midl::Storage::bfloat16)
    run_pack<bf16>(call);
  else
    run_pack<float>(call);
}

void topk(const midl::TopK& call) {
  const std::int64_t padded = round_up(call.groups, L);
  const int threads = double(call.rows) * double(call.groups) < kThreadWorth / 16 ? 1 : call.threads;
  const std::size_t bytes = std::size_t(round_up(2 * padded, 16)) * sizeof(std::int32_t);
  char* memory = midl::scratch(bytes * std::size_t(threads));
  const Rule rule(call.k, call.groups, call.threshold, false);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::int32_t* keys = reinterpret_cast<std::int32_t*>(memory + bytes * std::size_t(omp_get_thread_num()));
    const Range rows = part_of(call.rows, omp_get_thread_num(), omp_get_num_threads(), 1);
    for (std::int64_t r = rows.begin; r < rows.end; ++r)
      select_row(call.scores + r * call.groups, nullptr, call.groups, rule, keys, keys + padded,
                 call.selected + r * call.k, nullptr);
  }
}

}  // namespace
