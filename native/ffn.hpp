// An FFN: code; gate and selection; per group of hidden units and the rows that chose it, the up-projection and the
// activation; per block of outputs the light path and the groups' shares. A chunk's selected hidden units live in scratch
// memory.
#pragma once

#include <atomic>
#include <new>

#include "forward.hpp"

namespace {

// Rows that share the packing of a panel.
constexpr std::int64_t kFfnRows = 128;
// Fewer rows per thread than this are computed by all threads together, or each would read most weights for a few rows.
constexpr std::int64_t kFfnOwnRows = 128;
// So many rows of hidden units, which lie close together, go over a panel of the down-projection at once.
constexpr std::int64_t kFfnTallTile = L >= 16 ? 14 : panel_rows(2);
// Up to this many rows wait for memory: all outputs of a group, which lie side by side, before the next group.
constexpr std::int64_t kFfnByGroupRows = kFfnTallTile;
MIDL_INLINE std::int64_t groups_of_panels(std::int64_t groups, std::int64_t hidden) {
  return hidden / groups < midl::kFfnPanelGroup ? 1 : groups;
}

// Maximal error 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
MIDL_INLINE Vec error_function(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.3275911f * size);
  const Vec p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const Vec y = 1.0f - p * exponential(-x * x);
  return x < 0.0f ? -y : y;
}

MIDL_INLINE Vec activate(Vec x, midl::Activation activation) {
  switch (activation) {
    case midl::Activation::relu: return x < 0.0f ? Vec{} : x;  // NaN stays
    case midl::Activation::silu: return x * sigmoid(x);
    // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    case midl::Activation::gelu_tanh: return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    default: return 0.5f * x * (1.0f + error_function(0.70710678119f * x));
  }
}

// A call whose parameters, rows and results are of type T; what midl::FfnForward says.
template <class T>
struct FfnCall {
  const T* x;
  std::int64_t x_stride, rows, depth, hidden, outputs, rank, groups, selected_groups;
  float threshold;
  const T *weight, *bias, *value_weight, *value_bias, *down_weight, *down_bias, *light_down, *light_up, *light_hidden, *light_bias,
      *gate_weight, *gate_bias;
  const float* noise;
  const T* panels;
  bool hard;
  midl::Activation activation;
  T* y;
  std::int32_t* selected;
  int threads;

  explicit FfnCall(const midl::FfnForward& c)
      : x(of(c.x)), x_stride(c.x_stride), rows(c.rows), depth(c.depth), hidden(c.hidden), outputs(c.outputs), rank(c.rank),
        groups(c.groups), selected_groups(c.selected_groups), threshold(c.threshold), weight(of(c.weight)), bias(of(c.bias)),
        value_weight(of(c.value_weight)), value_bias(of(c.value_bias)), down_weight(of(c.down_weight)),
        down_bias(of(c.down_bias)), light_down(of(c.light_down)), light_up(of(c.light_up)), light_hidden(of(c.light_hidden)),
        light_bias(of(c.light_bias)), gate_weight(of(c.gate_weight)), gate_bias(of(c.gate_bias)), noise(c.noise),
        panels(of(c.panels)), hard(c.hard), activation(c.activation), y(static_cast<T*>(c.y)), selected(c.selected),
        threads(c.threads) {}

 private:
  static const T* of(const void* p) { return static_cast<const T*>(p); }
};

// The hidden units of each group in parts that a panel holds.
struct UnitParts {
  std::int64_t group_size, per_group;
  UnitParts(std::int64_t groups, std::int64_t hidden)
      : group_size(hidden / groups), per_group(divide_up(group_size, kPanelWidth)) {}
  std::int64_t first(std::int64_t group, std::int64_t part) const { return group * group_size + part * kPanelWidth; }
  int count(std::int64_t part) const { return int(lesser(group_size - part * kPanelWidth, kPanelWidth)); }
};

// Of a panel of the down-projection, whose depth `count` units are.
template <class T>
constexpr std::int64_t padded_units(std::int64_t count) {
  return round_up(count, kPadding<T>);
}

// Where the panels lie, in elements: those of the code, the gate and the light path; then those of all groups'
// up-projections, of the value's, and of the down-projection, whose depth the units are. Narrow groups share panels: all
// units are one group here.
template <class T>
struct FfnLayout {
  std::int64_t depth, rank, group_size, padded_size, padded_outputs, gate, light, up, value, down, size;
  FfnLayout(std::int64_t depth_, std::int64_t rank_, std::int64_t outputs, std::int64_t groups, std::int64_t hidden, bool gated)
      : depth(packed_depth<T>(depth_)), rank(packed_depth<T>(rank_)), group_size(hidden / groups_of_panels(groups, hidden)),
        padded_size(round_up(group_size, L > kPadding<T> ? L : kPadding<T>)), padded_outputs(round_up(outputs, kPanelWidth)) {
    const std::int64_t lanes = hidden / group_size * padded_size;
    gate = round_up(rank_, kPanelWidth) * depth;
    light = gate + round_up(groups, kPanelWidth) * rank;
    up = light + padded_outputs * rank;
    value = up + lanes * depth;
    down = value + (gated ? lanes * depth : 0);
    size = down + lanes * padded_outputs;
  }
  // The lane where the panel that begins with unit `first` begins.
  std::int64_t lane(std::int64_t first) const { return first / group_size * padded_size + first % group_size; }
  std::int64_t up_panel(std::int64_t first) const { return up + lane(first) * depth; }
  std::int64_t value_panel(std::int64_t first) const { return value + lane(first) * depth; }
  std::int64_t down_panel(std::int64_t first, int count, std::int64_t output) const {
    return down + lane(first) * padded_outputs + output * padded_units<T>(count);
  }
};

// The panel of `count` units for kPanelWidth outputs or, with zeros behind them, less: sub-panels of 2 L outputs, one line of
// them per word of the units.
template <class T>
void pack_outputs(const T* down_weight, std::int64_t stride, std::int64_t outputs, int count, T* panel) {
  for (int o = 0; o < kPanelWidth; o += 2 * L)
    pack_sub_panel(down_weight + o * stride, stride, int(outputs < o ? 0 : lesser(outputs - o, 2 * L)), 2 * L, count,
                   panel + o * padded_units<T>(count));
}

// Hidden units as the down-projection multiplies them: bfloat16 where there are dot products for it.
template <class T>
using HiddenUnit = Code<T>;

// out[r] (2 L values) += row r of hidden, `count` units, zeros behind them as in the panel, . sub-panel; meanwhile fetches
// the lines of `ahead`.
template <int R, class T>
[[gnu::noinline]] void add_units(const HiddenUnit<T>* hidden, const T* panel, int count, float* const* out, std::int64_t column,
                                 const T* ahead) {
  Vec acc[R][2];
  const HiddenUnit<T>* a[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    a[r] = hidden + r * kPanelWidth;
    for (int v = 0; v < 2; ++v) acc[r][v] = load(out[r] + column + v * L);
  }
#pragma GCC unroll 2
  for (int i = 0; i < count; i += kWord<T>) {
    __builtin_prefetch(ahead + i * (2 * L), 0, 2);
    if constexpr (L >= 16) __builtin_prefetch(ahead + i * (2 * L) + L * kWord<T>, 0, 2);
    add_word<R, 2, HiddenUnit<T>, T>(acc, a, i, true, [&](int v) { return panel + i * (2 * L) + v * (L * kWord<T>); });
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(out[r] + column + v * L, acc[r][v]);
}

template <class T, int R = int(kFfnTallTile), class... Args>
void add_units_of(std::int64_t rows, Args... args) {
  if (rows == R) return add_units<R, T>(args...);
  if constexpr (R > 1) add_units_of<T, R - 1>(rows, args...);
}

// More rows than this are worth tile registers, which hold their sums beside the outputs.
constexpr std::int64_t kFfnTileRows = 4;

#ifdef MIDL_TILES
// The same for any number of rows, by tiles of 16; whole tiles of hidden are read.
inline void add_units_by_tiles(const bf16* hidden, std::int64_t m, const bf16* panel, float* const* out, std::int64_t column,
                               const bf16* ahead) {
  constexpr std::int64_t kStride = 2 * kTileRegisterRows * 4;
  static_assert(kPanelWidth == kTileDepth);
  const char* lines = reinterpret_cast<const char*>(panel);
  for (int line = 0; line < kPanelWidth; ++line) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + line * 64, 0, 2);
  tile_load<4>(lines, kStride);
  tile_load<5>(lines + 64, kStride);
  alignas(64) float sums[2][kTileRegisterRows * L];
  for (std::int64_t first = 0; first < m; first += kTileRegisterRows) {
    tile_zero<0>();
    tile_zero<1>();
    tile_load<6>(hidden + first * kPanelWidth, kPanelWidth * 2);
    tile_multiply<0, 6, 4>();
    tile_multiply<1, 6, 5>();
    tile_store<0>(sums[0], 4 * L);
    tile_store<1>(sums[1], 4 * L);
    for (std::int64_t r = 0; r < lesser(kTileRegisterRows, m - first); ++r)
      for (int v = 0; v < 2; ++v) {
        float* to = out[first + r] + column + v * L;
        store(to, load(to) + load(sums[v] + r * L));
      }
  }
}
#else
inline void add_units_by_tiles(const bf16*, std::int64_t, const bf16*, float* const*, std::int64_t, const bf16*) {}
#endif

// Panels of outputs that registers can sum at once for one row.
constexpr int kFfnWidePanels = 12 * L / kPanelWidth < 1 ? 1 : 12 * L / kPanelWidth;

// The first unit of each word that holds one which `mask` names.
template <class T>
MIDL_INLINE std::uint32_t words_of(std::uint32_t mask) {
  return kWord<T> == 2 ? (mask | mask >> 1) & 0x55555555u : mask;
}

// out (P panels of outputs) += the units of a row that `mask` names . their lines of the panels. Units that share a word
// with them are zero.
template <int P, class T>
[[gnu::noinline]] void add_masked(const HiddenUnit<T>* hidden, std::uint32_t mask, const T* panels, int count, float* out) {
  constexpr int V = kPanelWidth / L, K = kWord<T>;  // vectors of a panel, two to a sub-panel
  const std::int64_t units = padded_units<T>(count);
  Vec acc[P][V];
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[p][v] = load(out + p * kPanelWidth + v * L);
  for (mask = words_of<T>(mask); mask; mask &= mask - 1) {
    const int i = __builtin_ctz(mask);
    const T* line = panels + i * (2 * L);
    const auto add = [&](auto product) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) product(acc[p][v], line + (p * kPanelWidth + v / 2 * (2 * L)) * units + v % 2 * (L * K));
    };
    if constexpr (sizeof(HiddenUnit<T>) == 2) {
      const UVec pair = splat(pair_at(hidden + i));
      add([&](Vec& sum, const T* column) { sum = add_dot_pairs(sum, pair, load_pairs(column)); });
    } else if constexpr (K == 2) {
      const Vec even = splat(hidden[i]), odd = splat(hidden[i + 1]);
      add([&](Vec& sum, const T* column) {
        sum += even * first_of_pairs(load_pairs(column));
        sum += odd * second_of_pairs(load_pairs(column));
      });
    } else {
      const Vec unit = splat(hidden[i]);
      add([&](Vec& sum, const T* column) { sum += unit * load(column); });
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + p * kPanelWidth + v * L, acc[p][v]);
}

// Fetch into the cache what add_masked() reads next for the units that `mask` names.
template <class T>
MIDL_INLINE void fetch_masked(const T* panels, std::int64_t count, std::uint32_t mask, std::int64_t units) {
  for (mask = words_of<T>(mask); mask; mask &= mask - 1)
    for (std::int64_t v = 0; v < count * kPanelWidth; v += 2 * L) {
      const T* line = panels + v * units + __builtin_ctz(mask) * (2 * L);
      __builtin_prefetch(line, 0, 2);
      if constexpr (L >= 16) __builtin_prefetch(line + L * kWord<T>, 0, 2);
    }
}

// More rows than this need nearly all lines: row `row` of `rows` fetches its share of them.
constexpr std::int64_t kFetchMaskedRows = 3;
template <class T>
MIDL_INLINE void fetch_share(const T* lines, std::int64_t elements, std::int64_t row, std::int64_t rows) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  const std::int64_t count = divide_up(elements, kLine);
  for (std::int64_t i = row * count / rows; i < (row + 1) * count / rows; ++i) __builtin_prefetch(lines + i * kLine, 0, 2);
}

template <class T, int P = kFfnWidePanels, class... Args>
void add_masked_of(std::int64_t panels, Args... args) {
  if (panels == P) return add_masked<P, T>(args...);
  if constexpr (P > 1) add_masked_of<T, P - 1>(panels, args...);
}

// Copy `count` values, or none from null, zeros behind them up to kPanelWidth.
template <class T>
void pad_panel(const T* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < kPanelWidth; ++i) to[i] = from && i < count ? to_float(from[i]) : 0.0f;
}

// Everything the threads of a team share.
template <class T>
struct FfnPlan {
  const FfnCall<T>& call;
  FfnLayout<T> layout;
  UnitParts parts;
  std::int64_t room, code_stride, gate_stride;
  bool repeat_gate, by_group, narrow;

  // For the chunk at hand. light_code is code or its rounded copy; `wide` its rows where they are multiplied as float32.
  float *code, *gate, *light_share, *wide;
  Code<T>* light_code;
  HiddenUnit<T>* hidden;
  std::int32_t* selected;
  std::uint32_t* masks;  // of narrow groups: which of a part's units a row selected
  std::atomic<std::int64_t>* taken;  // items of compute_hidden, per chunk

  FfnPlan(const FfnCall<T>& c, int team)
      : call(c), layout(c.depth, c.rank, c.outputs, c.groups, c.hidden, c.value_weight),
        parts(groups_of_panels(c.groups, c.hidden), c.hidden),
        room(lesser(c.rows, kFfnRows)), code_stride(round_up(c.rank, kPanelWidth)), gate_stride(gate_row(c.groups)),
        repeat_gate(team > 1 && double(room) * double(c.groups) * double(c.rank) < kRepeatWorth),
        by_group(room <= kFfnByGroupRows), narrow(c.hidden / c.groups < midl::kFfnPanelGroup) {}
  std::int64_t chunks() const { return divide_up(call.rows, room); }

  // Whether prepare() and a barrier precede row().
  static constexpr bool kPrepares = sizeof(Code<T>) != sizeof(T);
  void prepare(std::int64_t begin, Range rows) const {
    for (std::int64_t r = rows.begin; r < rows.end; ++r)
      copy_elements(call.x + (begin + r) * call.x_stride, call.depth, wide + r * call.depth);
  }
  // Row r of the chunk that begins with row `begin`.
  const Code<T>* row(std::int64_t begin, std::int64_t r) const {
    if constexpr (kPrepares)
      return wide + r * call.depth;
    else
      return call.x + (begin + r) * call.x_stride;
  }

  void carve(Carver& memory) {
    code = memory.take<float>(room * code_stride);
    if constexpr (sizeof(Code<T>) == 4)
      light_code = code;
    else
      light_code = memory.take<Code<T>>(room * code_stride);
    wide = memory.take<float>(kPrepares ? room * call.depth : 0);
    gate = memory.take<float>(room * gate_stride);
    light_share = memory.take<float>(room);
    selected = memory.take<std::int32_t>(room * call.selected_groups);
    // Tile registers read whole tiles.
    hidden = memory.take<HiddenUnit<T>>((room * (narrow ? 1 : call.selected_groups) * parts.per_group + (kTiles ? kTileRegisterRows : 0)) *
                                  kPanelWidth);
    masks = memory.take<std::uint32_t>(narrow ? room * parts.per_group : 0);
    taken = memory.take<std::atomic<std::int64_t>>(chunks());
  }
  void settle(char* memory) {
    Carver carver(memory);
    carve(carver);
    for (std::int64_t i = 0; i < chunks(); ++i) new (taken + i) std::atomic<std::int64_t>(0);
  }
  const T* panel_at(std::int64_t offset) const { return call.panels ? call.panels + offset : nullptr; }
  // Blocks of kPanelWidth outputs.
  std::int64_t output_panels() const { return layout.padded_outputs / kPanelWidth; }
};

// What one thread computes.
template <class T>
class FfnThread {
 public:
  FfnThread(const FfnPlan<T>& plan, Team team)
      : plan_(plan), call_(plan.call), team_(team), outputs_(part_of(plan.output_panels(), team.thread, team.threads, 1)) {}

  void carve(Carver& memory) {
    const FfnPlan<T>& p = plan_;
    inputs_ = memory.take<const Code<T>*>(p.room);
    codes_ = memory.take<const float*>(p.room);
    targets_ = memory.take<float*>(p.room);
    starts_ = memory.take<std::int32_t>(p.narrow ? 0 : call_.groups + 1);
    rows_ = memory.take<std::int32_t>(p.narrow ? 0 : p.room * call_.selected_groups);
    shares_ = memory.take<float>(p.narrow ? 0 : p.room * call_.selected_groups);
    keys_ = memory.take<std::int32_t>(round_up(call_.groups, L));
    picks_ = memory.take<std::int32_t>(round_up(call_.groups, L));
    unit_ = memory.take<float>(sizeof(HiddenUnit<T>) == 4 ? 0 : p.room * kPanelWidth);
    value_ = memory.take<float>(p.room * kPanelWidth);
    // Whole blocks, of all outputs of its own or of one after the other.
    out_ = memory.take<float>(p.room * kPanelWidth *
                              (p.by_group ? divide_up(p.output_panels(), team_.threads) : p.narrow ? kFfnWidePanels : 1));
    panels_ = memory.take<T>(p.narrow && !call_.panels ? kPanelWidth * kPanelWidth * kFfnWidePanels : 0);
    slice_ = memory.take<float>(slice_floats());
    sums_ = memory.take<float>(p.narrow && narrow_form<T>(p.room, call_.depth, call_.groups, call_.selected_groups, true) == Narrow::picked ? kPickedSums : 0);
    for (float*& vector : vectors_) vector = memory.take<float>(kPanelWidth);
    own_gate_ = memory.take<float>(p.repeat_gate ? p.room * p.gate_stride : 0);
    gate_ = p.repeat_gate ? own_gate_ : p.gate;
  }

  // Rows [begin, end) of the call.
  void compute_chunk(std::int64_t begin, std::int64_t end) {
    const std::int64_t rows = end - begin;
    // Many rows are dealt out by rows, few rows by columns.
    const bool by_rows = rows >= team_.threads * kTileRows;
    const Range all{0, rows}, own = part_of(rows, team_.thread, team_.threads, 1);
    if constexpr (FfnPlan<T>::kPrepares) {
      plan_.prepare(begin, own);
      team_.wait();
    }
    compute_code(begin, by_rows ? own : all,
                 by_rows ? Range{0, call_.rank} : part_of(call_.rank, team_.thread, team_.threads, kPanelWidth));
    team_.wait();
    const bool split = !plan_.repeat_gate && rows < team_.threads;
    const Range gated = plan_.repeat_gate || split ? all : own;
    compute_logits(gated, split ? part_of(call_.groups, team_.thread, team_.threads, kPanelWidth) : Range{0, call_.groups});
    if (split) team_.wait();
    select(begin, split ? own : gated);
    if (!plan_.repeat_gate) team_.wait();
    if (plan_.by_group)
      for (std::int64_t o = outputs_.begin; o < outputs_.end; ++o)
        compute_light(rows, o * kPanelWidth, out_ + (o - outputs_.begin) * kPanelWidth, own_stride());
    if (plan_.narrow) {
      compute_parts(begin, rows, plan_.taken[begin / plan_.room]);
      team_.wait();
      outputs_by_part(begin, rows);
      return;
    }
    sort_rows(rows);
    compute_hidden(begin, plan_.taken[begin / plan_.room]);
    team_.wait();
    if (plan_.by_group)
      outputs_by_group(begin, rows);
    else
      outputs_by_block(begin, rows);
  }

 private:
  std::int64_t own_stride() const { return (outputs_.end - outputs_.begin) * kPanelWidth; }

  // out (m x count) = rows . neurons^T + bias (kPanelWidth values, or null)
  void multiply(const Code<T>* const* rows, std::int64_t m, const Neurons<T>& neurons, std::int64_t depth, const float* bias,
                float* out, std::int64_t stride) {
    if constexpr (kTiles && sizeof(T) == 2)
      multiply_tiles(rows, m, neurons, depth, whole_steps(depth), bias, slice_, out, stride);
    else
      multiply_neurons(rows, m, neurons, depth, bias, slice_, out, stride);
  }

  void compute_code(std::int64_t begin, Range rows, Range columns) {
    if (rows.begin == rows.end) return;
    for (std::int64_t r = rows.begin; r < rows.end; ++r) inputs_[r - rows.begin] = plan_.row(begin, r);
    for (std::int64_t i = columns.begin; i < columns.end; i += kPanelWidth)
      multiply(inputs_, rows.end - rows.begin,
               {call_.light_down + i * call_.depth, call_.depth, plan_.panel_at(i * plan_.layout.depth),
                int(lesser(kPanelWidth, columns.end - i)),
                i + kPanelWidth < columns.end ? plan_.panel_at((i + kPanelWidth) * plan_.layout.depth) : nullptr},
               call_.depth, nullptr, plan_.code + rows.begin * plan_.code_stride + i, plan_.code_stride);
    if constexpr (sizeof(Code<T>) != 4)
      for (std::int64_t r = rows.begin; r < rows.end; ++r)
        for (std::int64_t i = columns.begin; i < columns.end; i += L)
          store_as(plan_.light_code + r * plan_.code_stride + i, load(plan_.code + r * plan_.code_stride + i));
  }

  void compute_logits(Range rows, Range groups) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) codes_[r - rows.begin] = plan_.code + r * plan_.code_stride;
    for (std::int64_t g = groups.begin; g < groups.end; g += kPanelWidth) {
      const std::int64_t count = lesser(kPanelWidth, groups.end - g);
      pad_panel(call_.gate_bias + g, count, vectors_[0]);
      multiply_neurons(codes_, rows.end - rows.begin,
                       Neurons<T>{call_.gate_weight + g * call_.rank, call_.rank,
                                  plan_.panel_at(plan_.layout.gate + g * plan_.layout.rank), int(count)},
                       call_.rank, vectors_[0], slice_, gate_ + rows.begin * plan_.gate_stride + g, plan_.gate_stride);
    }
  }

  // Threads that repeat the gate write the same.
  void select(std::int64_t begin, Range rows) {
    const std::int64_t k = call_.selected_groups;
    const Rule rule(k, call_.groups, call_.threshold, call_.hard);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      float* gate = gate_ + r * plan_.gate_stride;
      std::int32_t* selected = plan_.selected + r * k;
      select_row(gate, call_.noise ? call_.noise + (begin + r) * call_.groups : nullptr, call_.groups,
                 rule, keys_, picks_, selected, gate);
      float share = 0;
      for (std::int64_t i = 0; i < k && selected[i] >= 0; ++i) share += gate[selected[i]];
      plan_.light_share[r] = 1.0f - share / float(call_.groups);
      if (call_.selected) __builtin_memcpy(call_.selected + (begin + r) * k, selected, sizeof(std::int32_t) * std::size_t(k));
    }
  }

  // By group: the rows of group g are entries [starts[g], starts[g + 1]).
  void sort_rows(std::int64_t rows) {
    const std::int64_t k = call_.selected_groups, entries = rows * k;
    const std::int32_t* selected = plan_.selected;
    for (std::int64_t g = 0; g <= call_.groups; ++g) starts_[g] = 0;
    for (std::int64_t i = 0; i < entries; ++i)
      if (selected[i] >= 0) ++starts_[selected[i] + 1];
    for (std::int64_t g = 0; g < call_.groups; ++g) starts_[g + 1] += starts_[g];
    // Filling moves each start to its end; the loop behind moves them back.
    for (std::int64_t i = 0; i < entries; ++i) {
      if (selected[i] < 0) continue;
      const std::int32_t at = starts_[selected[i]]++;
      rows_[at] = std::int32_t(i / k);
      shares_[at] = gate_[i / k * plan_.gate_stride + selected[i]];
    }
    for (std::int64_t g = call_.groups; g > 0; --g) starts_[g] = starts_[g - 1];
    starts_[0] = 0;
  }
  std::int64_t members(std::int64_t group) const { return starts_[group + 1] - starts_[group]; }
  // The next group that rows chose, from `group` on.
  std::int64_t chosen(std::int64_t group) const {
    while (group < call_.groups && members(group) == 0) ++group;
    return group;
  }

  // Of a group's part: (members, kPanelWidth).
  HiddenUnit<T>* hidden_of(std::int64_t group, std::int64_t part) const {
    return plan_.hidden + (starts_[group] * plan_.parts.per_group + part * members(group)) * kPanelWidth;
  }

  // The groups in turns, taken one ahead, so that a thread knows which panel to fetch while it is busy with another.
  void compute_hidden(std::int64_t begin, std::atomic<std::int64_t>& taken) {
    const auto take = [&] {
      std::int64_t g;
      do g = taken.fetch_add(1, std::memory_order_relaxed);
      while (g < call_.groups && members(g) == 0);
      return g;
    };
    for (std::int64_t g = take(), next; g < call_.groups; g = next) {
      next = take();
      const std::int64_t m = members(g), parts = plan_.parts.per_group;
      for (std::int64_t r = 0; r < m; ++r) inputs_[r] = plan_.row(begin, rows_[starts_[g] + r]);
      for (std::int64_t p = 0; p < parts; ++p) {
        const std::int64_t after = p + 1 < parts ? plan_.parts.first(g, p + 1) : next < call_.groups ? plan_.parts.first(next, 0) : -1;
        compute_units(m, shares_ + starts_[g], plan_.parts.first(g, p), plan_.parts.count(p), after, hidden_of(g, p));
      }
    }
  }

  // Where the up-projection of units is summed up that become `hidden`.
  float* sums_for(HiddenUnit<T>* hidden) const {
    if constexpr (sizeof(HiddenUnit<T>) == 4)
      return hidden;
    else
      return unit_;
  }

  // share * (act(x . weight) [* x . value] - light) of `count` units from `first` on, for m rows
  void compute_units(std::int64_t m, const float* shares, std::int64_t first, int count, std::int64_t after, HiddenUnit<T>* hidden) {
    const auto project = [&](const T* weight, std::int64_t panel, const T* bias, const T* next, float* padded, float* out) {
      pad_panel(bias ? bias + first : nullptr, count, padded);
      multiply(inputs_, m, {weight + first * call_.depth, call_.depth, plan_.panel_at(panel), count, next}, call_.depth, padded, out,
               kPanelWidth);
    };
    const FfnLayout<T>& layout = plan_.layout;
    const T* next = after < 0 ? nullptr : plan_.panel_at(layout.up_panel(after));
    float* sums = sums_for(hidden);
    project(call_.weight, layout.up_panel(first), call_.bias,
            call_.value_weight ? plan_.panel_at(layout.value_panel(first)) : next, vectors_[0], sums);
    if (call_.value_weight) project(call_.value_weight, layout.value_panel(first), call_.value_bias, next, vectors_[1], value_);
    pad_panel(call_.light_hidden + first, count, vectors_[2]);
    for (std::int64_t r = 0; r < m; ++r) {
      for (int v = 0; v < count; v += L) {
        const std::int64_t at = r * kPanelWidth + v;
        store_as(hidden + at, activated(load(sums + at), value_ + at, v) * shares[r]);
      }
      pad_units(hidden + r * kPanelWidth, count);
    }
  }

  // Units from `unit` of the part at hand on, of which x . weight and, at `value`, x . value are known; less their light value.
  Vec activated(Vec before, const float* value, int unit) const {
    Vec h = activate(before, call_.activation);
    if (call_.value_weight) h *= load(value);
    return h - load(vectors_[2] + unit);
  }

  // What the padding of panels is multiplied with.
  static void pad_units(HiddenUnit<T>* units, int count) {
    for (std::int64_t i = count; i < padded_units<T>(count); ++i) store_as(units + i, 0.0f);
  }

  // Narrow groups, many to a part of kPanelWidth units: the up-projection as narrow_form() says; then of each row only the
  // selected units' outputs.
  void compute_parts(std::int64_t begin, std::int64_t rows, std::atomic<std::int64_t>& taken) {
    const std::int64_t parts = plan_.parts.per_group;
    const Narrow form = narrow_form<T>(rows, call_.depth, call_.groups, call_.selected_groups, true);
    // Taken one ahead, as groups are.
    const auto take = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
    for (std::int64_t p = take(), next; p < parts; p = next) {
      next = take();
      const std::int64_t first = plan_.parts.first(0, p);
      const int count = plan_.parts.count(p);
      HiddenUnit<T>* hidden = plan_.hidden + p * rows * kPanelWidth;
      float* sums = sums_for(hidden);
      pad_panel(call_.bias ? call_.bias + first : nullptr, count, vectors_[0]);
      pad_panel(call_.value_bias ? call_.value_bias + first : nullptr, count, vectors_[1]);
      pad_panel(call_.light_hidden + first, count, vectors_[2]);
      for (std::int64_t r = 0; r < rows; ++r) inputs_[r] = plan_.row(begin, r);
      const GateSpread spread(first, count, call_.hidden / call_.groups, 0.0f);
      float shares[kPanelWidth];
      std::uint32_t* masks = plan_.masks + p * rows;
      const std::uint32_t inside = ~0u >> (kPanelWidth - count);
      for (std::int64_t r = 0; r < rows; ++r) {
        spread(gate_ + r * plan_.gate_stride, shares);
        masks[r] = selected_bits(shares) & inside;
      }
      const auto project = [&](const T* weight, std::int64_t panel, const float* bias, float* out, const T* after) {
        multiply(inputs_, rows, {weight + first * call_.depth, call_.depth, plan_.panel_at(panel), count, after}, call_.depth, bias,
                 out, kPanelWidth);
      };
      if (form == Narrow::dense) {
        const FfnLayout<T>& layout = plan_.layout;
        const T* after = next < parts ? plan_.panel_at(layout.up_panel(plan_.parts.first(0, next))) : nullptr;
        project(call_.weight, layout.up_panel(first), vectors_[0], sums,
                call_.value_weight ? plan_.panel_at(layout.value_panel(first)) : after);
        if (call_.value_weight) project(call_.value_weight, layout.value_panel(first), vectors_[1], value_, after);
      }
      if constexpr (kPicks<T>) {
        if (form == Narrow::picked) {
          const auto pick = [&](const T* weight, const T* after, float* out) {
            dot_picked(inputs_, masks, rows, weight + first * call_.depth, call_.depth, count, call_.depth, slice_, sums_, out, after);
          };
          const T* after = next < parts ? call_.weight + plan_.parts.first(0, next) * call_.depth : nullptr;
          pick(call_.weight, call_.value_weight ? call_.value_weight + first * call_.depth : after, sums);
          if (call_.value_weight) pick(call_.value_weight, after, value_);
        }
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        spread(gate_ + r * plan_.gate_stride, shares);
        const std::uint32_t mask = masks[r];
        float *unit = sums + r * kPanelWidth, *value = value_ + r * kPanelWidth;
        if (form == Narrow::picked) {
          add_bias(vectors_[0], unit);
          if (call_.value_weight) add_bias(vectors_[1], value);
        } else if (form == Narrow::sparse) {
          dot_selected(inputs_[r], call_.weight + first * call_.depth, mask, vectors_[0], unit);
          if (call_.value_weight) dot_selected(inputs_[r], call_.value_weight + first * call_.depth, mask, vectors_[1], value);
        }
        for (int v = 0; v < count; v += L) {
          Vec h = activated(load(unit + v), value + v, v) * load(shares + v);
          if constexpr (kWord<T> == 2) h = load(shares + v) < 0.0f ? Vec{} : h;  // may share a word with what is selected
          store_as(hidden + r * kPanelWidth + v, h);
        }
        pad_units(hidden + r * kPanelWidth, count);
      }
    }
  }

  static void add_bias(const float* bias, float* units) {
    for (int v = 0; v < kPanelWidth; v += L) store(units + v, load(units + v) + load(bias + v));
  }

  // out[i] = x . unit i + bias[i], of the units that `mask` names; anything elsewhere.
  void dot_selected(const Code<T>* x, const T* weight, std::uint32_t mask, const float* bias, float* out) {
    const T* units[kPanelWidth];
    int picks[kPanelWidth], count = 0;
    for (std::uint32_t left = mask; left; left &= left - 1) {
      picks[count] = __builtin_ctz(left);
      units[count] = weight + picks[count] * call_.depth;
      ++count;
    }
    float sums[kPanelWidth];
    dot_block(units, count, x, call_.depth, 1, 0, call_.depth, sums, 1, false);
    for (int i = 0; i < kPanelWidth; i += L) store(out + i, Vec{});
    for (int i = 0; i < count; ++i) out[picks[i]] = sums[i] + bias[picks[i]];
  }

  // The outputs of all parts: few rows take all outputs of a part, which lie side by side, before the next part.
  void outputs_by_part(std::int64_t begin, std::int64_t rows) {
    if (outputs_.begin == outputs_.end) return;
    const auto tile = [&](std::int64_t o) { return lesser(outputs_.end - o, kFfnWidePanels); };
    const auto lines_at = [&](std::int64_t p, std::int64_t o) {
      return plan_.panel_at(plan_.layout.down_panel(plan_.parts.first(0, p), plan_.parts.count(p), o * kPanelWidth));
    };
    // Meanwhile what tile `next_o` of part `next_p` reads is fetched.
    const auto add = [&](std::int64_t p, std::int64_t o, float* out, std::int64_t stride, std::int64_t next_p, std::int64_t next_o) {
      const std::int64_t first = plan_.parts.first(0, p), output = o * kPanelWidth, panels = tile(o);
      const int count = plan_.parts.count(p);
      const T* lines = lines_at(p, o);
      const T* next = next_p < plan_.parts.per_group ? lines_at(next_p, next_o) : nullptr;
      const std::int64_t next_units = next ? padded_units<T>(plan_.parts.count(next_p)) : 0;
      if (!lines) {
        for (std::int64_t i = 0; i < panels; ++i)
          pack_outputs(call_.down_weight + (output + i * kPanelWidth) * call_.hidden + first, call_.hidden,
                       call_.outputs - output - i * kPanelWidth, count, panels_ + i * kPanelWidth * padded_units<T>(count));
        lines = panels_;
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        if (next && rows > kFetchMaskedRows)
          fetch_share(next, tile(next_o) * kPanelWidth * next_units, r, rows);
        else if (next)
          fetch_masked<T>(next, tile(next_o), plan_.masks[next_p * rows + r], next_units);
        add_masked_of<T>(panels, plan_.hidden + (p * rows + r) * kPanelWidth, plan_.masks[p * rows + r], lines, count, out + r * stride);
      }
    };
    const auto columns = [&](std::int64_t from, std::int64_t to) { return Range{from * kPanelWidth, lesser(to * kPanelWidth, call_.outputs)}; };
    if (plan_.by_group) {
      for (std::int64_t p = 0; p < plan_.parts.per_group; ++p)
        for (std::int64_t o = outputs_.begin; o < outputs_.end; o += kFfnWidePanels)
          add(p, o, out_ + (o - outputs_.begin) * kPanelWidth, own_stride(), o + kFfnWidePanels < outputs_.end ? p : p + 1,
              o + kFfnWidePanels < outputs_.end ? o + kFfnWidePanels : outputs_.begin);
      return write_outputs(begin, rows, columns(outputs_.begin, outputs_.end), out_, own_stride());
    }
    for (std::int64_t o = outputs_.begin; o < outputs_.end; o += kFfnWidePanels) {
      const std::int64_t stride = tile(o) * kPanelWidth;
      for (std::int64_t i = 0; i < tile(o); ++i) compute_light(rows, (o + i) * kPanelWidth, out_ + i * kPanelWidth, stride);
      for (std::int64_t p = 0; p < plan_.parts.per_group; ++p) add(p, o, out_, stride, p + 1, o);
      write_outputs(begin, rows, columns(o, o + tile(o)), out_, stride);
    }
  }

  // out (rows x kPanelWidth) = the light path's share of a block of outputs, with their biases.
  void compute_light(std::int64_t rows, std::int64_t output, float* out, std::int64_t stride) {
    const std::int64_t count = lesser(kPanelWidth, call_.outputs - output);
    pad_panel(call_.light_bias + output, count, vectors_[0]);
    pad_panel(call_.down_bias ? call_.down_bias + output : nullptr, count, vectors_[1]);
    for (std::int64_t r = 0; r < rows; ++r) inputs_[r] = plan_.light_code + r * plan_.code_stride;
    multiply(inputs_, rows,
             {call_.light_up + output * call_.rank, call_.rank,
              plan_.panel_at(plan_.layout.light + output * plan_.layout.rank), int(count)},
             call_.rank, nullptr, out, stride);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* to = out + r * stride;
      const float share = plan_.light_share[r];
      int v = 0;
      for (; v < count; v += L) store(to + v, share * load(to + v) + (load(vectors_[0] + v) + load(vectors_[1] + v)));
      for (; v < kPanelWidth; v += L) store(to + v, Vec{});
    }
  }

  // out, where the rows of a group have their targets, += hidden . down, for a block of outputs.
  void add_outputs(std::int64_t m, std::int64_t first, int count, const HiddenUnit<T>* hidden, std::int64_t output, std::int64_t column,
                   const T* next) {
    const T* panel = plan_.panel_at(plan_.layout.down_panel(first, count, output));
    if (!panel) {
      T* packed = reinterpret_cast<T*>(slice_);
      pack_outputs(call_.down_weight + output * call_.hidden + first, call_.hidden, call_.outputs - output, count, packed);
      panel = packed;
    }
    if (!next) next = panel;
    const std::int64_t units = padded_units<T>(count);
    if constexpr (kTiles && sizeof(T) == 2) {
      if (m > kFfnTileRows) return add_units_by_tiles(hidden, m, panel, targets_, column, next);
    }
    const std::int64_t tiles = m <= kFfnTallTile ? 1 : divide_up(m, panel_rows(2)), even = divide_up(m, tiles);
    for (std::int64_t r = 0; r < m; r += even)
      for (int c = 0; c < kPanelWidth; c += 2 * L)
        add_units_of<T>(lesser(even, m - r), hidden + r * kPanelWidth, panel + c * units, count, targets_ + r, column + c,
                        r == 0 ? next + c * units : panel);
  }

  void write_outputs(std::int64_t begin, std::int64_t rows, Range outputs, const float* from, std::int64_t stride) {
    for (std::int64_t r = 0; r < rows; ++r) {
      T* to = call_.y + (begin + r) * call_.outputs;
      std::int64_t o = outputs.begin;
      for (; o + L <= outputs.end; o += L) store_as(to + o, load(from + r * stride + o - outputs.begin));
      for (; o < outputs.end; ++o) store_as(to + o, from[r * stride + o - outputs.begin]);
    }
  }

  void outputs_by_group(std::int64_t begin, std::int64_t rows) {
    if (outputs_.begin == outputs_.end) return;
    for (std::int64_t g = 0; g < call_.groups; ++g) {
      const std::int64_t m = members(g);
      for (std::int64_t r = 0; r < m; ++r) targets_[r] = out_ + rows_[starts_[g] + r] * own_stride();
      for (std::int64_t p = 0; m > 0 && p < plan_.parts.per_group; ++p) {
        const std::int64_t first = plan_.parts.first(g, p);
        const int count = plan_.parts.count(p);
        if (m == 1 && call_.panels) {  // for one row, registers hold many outputs
          for (std::int64_t o = outputs_.begin; o < outputs_.end; o += kFfnWidePanels)
            add_masked_of<T>(lesser(outputs_.end - o, kFfnWidePanels), hidden_of(g, p), ~std::uint32_t(0) >> (kPanelWidth - count),
                          plan_.panel_at(plan_.layout.down_panel(first, count, o * kPanelWidth)), count,
                          targets_[0] + (o - outputs_.begin) * kPanelWidth);
          continue;
        }
        for (std::int64_t o = outputs_.begin; o < outputs_.end; ++o) {
          const std::int64_t output = o * kPanelWidth;
          // What lies behind it comes next.
          add_outputs(m, first, count, hidden_of(g, p), output, output - outputs_.begin * kPanelWidth,
                      plan_.panel_at(plan_.layout.down_panel(first, count, output + kPanelWidth)));
        }
      }
    }
    write_outputs(begin, rows, {outputs_.begin * kPanelWidth, lesser(outputs_.end * kPanelWidth, call_.outputs)}, out_, own_stride());
  }

  void outputs_by_block(std::int64_t begin, std::int64_t rows) {
    for (std::int64_t o = outputs_.begin; o < outputs_.end; ++o) {
      const std::int64_t output = o * kPanelWidth;
      compute_light(rows, output, out_, kPanelWidth);
      for (std::int64_t g = chosen(0), next; g < call_.groups; g = next) {
        next = chosen(g + 1);
        const std::int64_t m = members(g), parts = plan_.parts.per_group;
        for (std::int64_t r = 0; r < m; ++r) targets_[r] = out_ + rows_[starts_[g] + r] * kPanelWidth;
        for (std::int64_t p = 0; p < parts; ++p) {
          const bool last = p + 1 == parts;
          const T* after = last && next == call_.groups
                                   ? nullptr
                                   : plan_.panel_at(plan_.layout.down_panel(plan_.parts.first(last ? next : g, last ? 0 : p + 1),
                                                                            plan_.parts.count(last ? 0 : p + 1), output));
          add_outputs(m, plan_.parts.first(g, p), plan_.parts.count(p), hidden_of(g, p), output, 0, after);
        }
      }
      write_outputs(begin, rows, {output, lesser(output + kPanelWidth, call_.outputs)}, out_, kPanelWidth);
    }
  }

  const FfnPlan<T>& plan_;
  const FfnCall<T>& call_;
  const Team team_;
  const Range outputs_;  // blocks of them
  const Code<T>** inputs_ = nullptr;
  const float** codes_ = nullptr;
  float** targets_ = nullptr;
  std::int32_t *starts_ = nullptr, *rows_ = nullptr, *keys_ = nullptr, *picks_ = nullptr;
  float *shares_ = nullptr, *unit_ = nullptr, *value_ = nullptr, *out_ = nullptr, *slice_ = nullptr, *sums_ = nullptr, *vectors_[3] = {},
        *own_gate_ = nullptr, *gate_ = nullptr;
  T* panels_ = nullptr;
};

// All chunks of a call, whose memory is settled.
template <class T>
void compute_ffn(const FfnPlan<T>& plan, FfnThread<T>& thread, Team team) {
  for (std::int64_t begin = 0; begin < plan.call.rows; begin += plan.room) {
    const std::int64_t end = lesser(plan.call.rows, begin + plan.room);
    thread.compute_chunk(begin, end);
    if (end < plan.call.rows) team.wait();
  }
}

// All threads share the rows.
template <class T>
void ffn_together(const FfnCall<T>& call, int threads) {
  FfnPlan<T> plan(call, threads);
  Carver shared(nullptr), own(nullptr);
  plan.carve(shared);
  FfnThread<T>(plan, {threads, 0}).carve(own);
  const std::size_t common = shared.used();
  // A smaller team than asked for, as in a nested region, has more outputs per thread.
  const std::size_t each = own.used() + std::size_t(plan.by_group ? plan.room * plan.layout.padded_outputs : 0) * sizeof(float);
  char* memory = midl::scratch(common + each * std::size_t(threads));
  plan.settle(memory);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Team team{omp_get_num_threads(), omp_get_thread_num()};
    FfnThread<T> thread(plan, team);
    [[maybe_unused]] const TilesFor<T> tiles;
    Carver mine(memory + common + each * std::size_t(team.thread));
    thread.carve(mine);
    compute_ffn(plan, thread, team);
  }
}

// Each thread has rows of its own.
template <class T>
void ffn_by_rows(const FfnCall<T>& call, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Range own = part_of(call.rows, omp_get_thread_num(), omp_get_num_threads(), 1);
    FfnCall<T> part = call;
    part.rows = own.end - own.begin;
    part.x += own.begin * call.x_stride;
    part.y += own.begin * call.outputs;
    if (call.noise) part.noise += own.begin * call.groups;
    if (call.selected) part.selected += own.begin * call.selected_groups;
    if (part.rows > 0) ffn_together(part, 1);
  }
}

template <class T>
void run_ffn(const FfnCall<T>& call) {
  const double full = double(call.selected_groups) * double(call.hidden / call.groups) *
                      double((call.value_weight ? 2 : 1) * call.depth + call.outputs);
  const double work = double(call.rows) * (full + double(call.rank) * double(call.depth + call.outputs + call.groups));
  const int threads = int(lesser(call.threads, std::int64_t(work / kThreadWorth) + 1));
  if (threads > 1 && call.rows >= threads * kFfnOwnRows)
    ffn_by_rows(call, threads);
  else
    ffn_together(call, threads);
}

void ffn_forward(const midl::FfnForward& call) {
  if (call.rows == 0) return;
  if (call.storage == midl::Storage::bfloat16)
    run_ffn(FfnCall<bf16>(call));
  else
    run_ffn(FfnCall<float>(call));
}

template <class T>
FfnLayout<T> layout_of(const midl::FfnPack& call) {
  return {call.depth, call.rank, call.outputs, call.groups, call.hidden, call.value_weight != nullptr};
}

std::int64_t packed_ffn_size(const midl::FfnPack& call) {
  return call.storage == midl::Storage::bfloat16 ? layout_of<bf16>(call).size : layout_of<float>(call).size;
}

template <class T>
void run_pack_ffn(const midl::FfnPack& call) {
  const FfnLayout<T> layout = layout_of<T>(call);
  const std::int64_t groups = groups_of_panels(call.groups, call.hidden);
  const UnitParts parts(groups, call.hidden);
  T* panels = static_cast<T*>(call.panels);
  const auto of = [](const void* matrix) { return static_cast<const T*>(matrix); };
  const auto pack_rows = [](const T* matrix, std::int64_t i, std::int64_t end, std::int64_t depth, T* to, std::int64_t padded) {
    pack_panel(matrix + i * depth, depth, int(lesser(kPanelWidth, end - i)), depth, to + i * padded);
  };
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < call.rank; i += kPanelWidth)
      pack_rows(of(call.light_down), i, call.rank, call.depth, panels, layout.depth);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < call.groups; i += kPanelWidth)
      pack_rows(of(call.gate_weight), i, call.groups, call.rank, panels + layout.gate, layout.rank);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < call.outputs; i += kPanelWidth)
      pack_rows(of(call.light_up), i, call.outputs, call.rank, panels + layout.light, layout.rank);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < groups * parts.per_group; ++i) {
      const std::int64_t first = parts.first(i / parts.per_group, i % parts.per_group);
      const int count = parts.count(i % parts.per_group);
      pack_panel(of(call.weight) + first * call.depth, call.depth, count, call.depth, panels + layout.up_panel(first));
      if (call.value_weight)
        pack_panel(of(call.value_weight) + first * call.depth, call.depth, count, call.depth, panels + layout.value_panel(first));
      for (std::int64_t o = 0; o < call.outputs; o += kPanelWidth)
        pack_outputs(of(call.down_weight) + o * call.hidden + first, call.hidden, call.outputs - o, count,
                     panels + layout.down_panel(first, count, o));
    }
  }
}

void pack_ffn(const midl::FfnPack& call) {
  if (call.storage == midl::Storage::bfloat16)
    run_pack_ffn<bf16>(call);
  else
    run_pack_ffn<float>(call);
}

}  // namespace
