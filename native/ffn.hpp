// The sparse part of an FFN: per group of hidden units and the rows that chose it, the up-projection, the activation and
// the group's share of the output. Hidden units live in scratch memory, for one panel at a time where a thread has rows of
// its own; code, gate and light path are the caller's, which hands over y with the light path in it.
#pragma once

#include "forward.hpp"

namespace {

// Rows that share the packing of a panel; their outputs should stay in cache.
constexpr std::int64_t kFfnRows = 256;
// Fewer rows per thread than this are computed by all threads together, or each would read most weights for a few rows.
constexpr std::int64_t kFfnOwnRows = 64;

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

// The rows of a chunk by group: those of group g are entries [starts[g], starts[g + 1]).
struct RowsByGroup {
  std::int32_t *starts, *rows;
  float* shares;
};

inline void sort_rows(const midl::FfnForward& call, Range chunk, RowsByGroup& by_group) {
  const std::int64_t k = call.selected_groups, entries = (chunk.end - chunk.begin) * k;
  const std::int32_t* selected = call.selected + chunk.begin * k;
  for (std::int64_t g = 0; g <= call.groups; ++g) by_group.starts[g] = 0;
  for (std::int64_t i = 0; i < entries; ++i)
    if (selected[i] >= 0) ++by_group.starts[selected[i] + 1];
  for (std::int64_t g = 0; g < call.groups; ++g) by_group.starts[g + 1] += by_group.starts[g];
  // Filling moves each start to its end; the loop behind moves them back.
  for (std::int64_t i = 0; i < entries; ++i) {
    if (selected[i] < 0) continue;
    const std::int32_t at = by_group.starts[selected[i]]++;
    by_group.rows[at] = std::int32_t(i / k);
    by_group.shares[at] = call.shares ? call.shares[chunk.begin * k + i] : 1.0f;
  }
  for (std::int64_t g = call.groups; g > 0; --g) by_group.starts[g] = by_group.starts[g - 1];
  by_group.starts[0] = 0;
}

// Copy `count` values, zeros behind them up to kPanelWidth.
inline void pad_panel(const float* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < kPanelWidth; ++i) to[i] = from && i < count ? from[i] : 0.0f;
}

// Where the panels of a group's units lie, in elements: first those of all groups' up-projections, then of the value's,
// then of the down-projection, whose depth the units are.
struct FfnLayout {
  std::int64_t depth, outputs, group_size, padded_size, padded_outputs, value, down, size;
  FfnLayout(std::int64_t depth_, std::int64_t outputs_, std::int64_t groups, std::int64_t hidden, bool gated)
      : depth(depth_), outputs(outputs_), group_size(hidden / groups), padded_size(round_up(group_size, L)),
        padded_outputs(round_up(outputs_, L)) {
    const std::int64_t lanes = groups * padded_size;
    value = lanes * depth;
    down = value * (gated ? 2 : 1);
    size = down + lanes * padded_outputs;
  }
  // The lane where the panel that begins with unit `first` begins.
  std::int64_t lane(std::int64_t first) const { return first / group_size * padded_size + first % group_size; }
  std::int64_t up_panel(std::int64_t first) const { return lane(first) * depth; }
  std::int64_t value_panel(std::int64_t first) const { return value + lane(first) * depth; }
  std::int64_t down_panel(std::int64_t first, int count, std::int64_t output) const {
    return down + lane(first) * padded_outputs + output * count;
  }
};

// What one thread needs to compute with.
class FfnThread {
 public:
  explicit FfnThread(const midl::FfnForward& call)
      : call_(call), layout_(call.depth, call.outputs, call.groups, call.hidden, call.value_weight) {}

  void carve(Carver& memory, std::int64_t rows) {
    inputs_ = memory.take<const float*>(rows);
    units_ = memory.take<const float*>(rows);
    value_ = memory.take<float>(rows * kPanelWidth);
    out_ = memory.take<float>(rows * kPanelWidth);
    slice_ = memory.take<float>(slice_floats());
    for (float*& vector : vectors_) vector = memory.take<float>(kPanelWidth);
  }

  // Of `count` units from `first` on, for those m rows of a chunk: hidden (m x count, row stride kPanelWidth) =
  // share * (act(x . weight) [* x . value] - light)
  void compute_units(std::int64_t chunk_begin, const std::int32_t* rows, const float* shares, std::int64_t m,
                     std::int64_t first, int count, float* hidden) {
    for (std::int64_t r = 0; r < m; ++r) inputs_[r] = call_.x + (chunk_begin + rows[r]) * call_.x_stride;
    const auto project = [&](const float* weight, std::int64_t panel, const float* bias, float* padded, float* out) {
      pad_panel(bias ? bias + first : nullptr, count, padded);
      const Neurons<float> units{weight + first * call_.depth, call_.depth, panel_at(panel), count};
      multiply_neurons(inputs_, m, units, call_.depth, padded, slice_, out, kPanelWidth);
    };
    project(call_.weight, layout_.up_panel(first), call_.bias, vectors_[0], hidden);
    if (call_.value_weight)
      project(call_.value_weight, layout_.value_panel(first), call_.value_bias, vectors_[1], value_);
    pad_panel(call_.light_hidden + first, count, vectors_[2]);
    for (std::int64_t r = 0; r < m; ++r)
      for (int v = 0; v < count; v += L) {
        float* unit = hidden + r * kPanelWidth + v;
        Vec h = activate(load(unit), call_.activation);
        if (call_.value_weight) h *= load(value_ + r * kPanelWidth + v);
        store(unit, (h - load(vectors_[2] + v)) * shares[r]);
      }
  }

  // y (those rows, outputs in the range) += hidden . down^T
  void add_outputs(std::int64_t chunk_begin, const std::int32_t* rows, std::int64_t m, std::int64_t first, int count,
                   const float* hidden, Range range) {
    for (std::int64_t r = 0; r < m; ++r) units_[r] = hidden + r * kPanelWidth;
    for (std::int64_t o = range.begin; o < range.end; o += kPanelWidth) {
      const int outputs = int(lesser(call_.outputs - o, kPanelWidth));
      const Neurons<float> columns{call_.down_weight + o * call_.hidden + first, call_.hidden,
                                   panel_at(layout_.down_panel(first, count, o)), outputs};
      multiply_neurons(units_, m, columns, count, nullptr, slice_, out_, kPanelWidth);
      for (std::int64_t r = 0; r < m; ++r) {
        float* y = call_.y + (chunk_begin + rows[r]) * call_.outputs + o;
        const float* add = out_ + r * kPanelWidth;
        int v = 0;
        for (; v + L <= outputs; v += L) store(y + v, load(y + v) + load(add + v));
        for (; v < outputs; ++v) y[v] += add[v];
      }
    }
  }

 private:
  const float* panel_at(std::int64_t offset) const { return call_.panels ? call_.panels + offset : nullptr; }

  const midl::FfnForward& call_;
  const FfnLayout layout_;
  const float **inputs_ = nullptr, **units_ = nullptr;
  float *value_ = nullptr, *out_ = nullptr, *slice_ = nullptr, *vectors_[3] = {};
};

// The hidden units of each group in parts that a panel holds.
struct UnitParts {
  std::int64_t group_size, per_group;
  explicit UnitParts(const midl::FfnForward& call)
      : group_size(call.hidden / call.groups), per_group(divide_up(group_size, kPanelWidth)) {}
  std::int64_t first(std::int64_t group, std::int64_t part) const { return group * group_size + part * kPanelWidth; }
  int count(std::int64_t part) const { return int(lesser(group_size - part * kPanelWidth, kPanelWidth)); }
};

inline void carve_rows(const midl::FfnForward& call, std::int64_t rows, Carver& memory, RowsByGroup& by_group) {
  by_group.starts = memory.take<std::int32_t>(call.groups + 1);
  by_group.rows = memory.take<std::int32_t>(rows * call.selected_groups);
  by_group.shares = memory.take<float>(rows * call.selected_groups);
}

// Each thread has rows of its own.
inline void ffn_by_rows(const midl::FfnForward& call, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Range own = part_of(call.rows, omp_get_thread_num(), omp_get_num_threads(), 1);
    const std::int64_t room = lesser(own.end - own.begin, kFfnRows);
    const UnitParts parts(call);
    FfnThread thread(call);
    RowsByGroup by_group{};
    float* hidden = nullptr;
    const auto carve = [&](Carver memory) {
      carve_rows(call, room, memory, by_group);
      hidden = memory.take<float>(room * kPanelWidth);
      thread.carve(memory, room);
      return memory.used();
    };
    carve(Carver(midl::scratch(carve(Carver(nullptr)))));
    const Range all{0, call.outputs};
    for (std::int64_t begin = own.begin; begin < own.end; begin += kFfnRows) {
      sort_rows(call, {begin, lesser(own.end, begin + kFfnRows)}, by_group);
      for (std::int64_t g = 0; g < call.groups; ++g) {
        const std::int64_t at = by_group.starts[g], m = by_group.starts[g + 1] - at;
        if (m == 0) continue;
        for (std::int64_t p = 0; p < parts.per_group; ++p) {
          thread.compute_units(begin, by_group.rows + at, by_group.shares + at, m, parts.first(g, p), parts.count(p), hidden);
          thread.add_outputs(begin, by_group.rows + at, m, parts.first(g, p), parts.count(p), hidden, all);
        }
      }
    }
  }
}

// All threads share the rows: they take the groups in turns for the hidden units, then each has outputs of its own. Every
// sum is taken in the same order as there.
inline void ffn_together(const midl::FfnForward& call, int threads) {
  const UnitParts parts(call);
  const std::int64_t room = lesser(call.rows, kFfnRows), panels = divide_up(call.outputs, kPanelWidth);
  RowsByGroup by_group{};
  float* hidden = nullptr;
  const auto carve = [&](Carver& memory) {
    carve_rows(call, room, memory, by_group);
    hidden = memory.take<float>(room * call.selected_groups * parts.per_group * kPanelWidth);
  };
  Carver common(nullptr), each(nullptr);
  carve(common);
  FfnThread(call).carve(each, room);
  char* base = midl::scratch(common.used() + each.used() * std::size_t(threads));
  Carver memory(base);
  carve(memory);
  const auto hidden_of = [&](std::int64_t at, std::int64_t m, std::int64_t part) {
    return hidden + (at * parts.per_group + part * m) * kPanelWidth;
  };
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than asked for, in a nested region for instance.
    const std::int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
    FfnThread thread(call);
    Carver mine(base + common.used() + each.used() * std::size_t(own));
    thread.carve(mine, room);
    const Range range = part_of(panels, own, team, 1);
    const Range outputs{range.begin * kPanelWidth, lesser(range.end * kPanelWidth, call.outputs)};
    for (std::int64_t begin = 0; begin < call.rows; begin += kFfnRows) {
#pragma omp single
      sort_rows(call, {begin, lesser(call.rows, begin + kFfnRows)}, by_group);
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t i = 0; i < call.groups * parts.per_group; ++i) {
        const std::int64_t g = i / parts.per_group, p = i % parts.per_group;
        const std::int64_t at = by_group.starts[g], m = by_group.starts[g + 1] - at;
        if (m > 0)
          thread.compute_units(begin, by_group.rows + at, by_group.shares + at, m, parts.first(g, p), parts.count(p),
                               hidden_of(at, m, p));
      }
      for (std::int64_t g = 0; g < call.groups; ++g) {
        const std::int64_t at = by_group.starts[g], m = by_group.starts[g + 1] - at;
        for (std::int64_t p = 0; m > 0 && p < parts.per_group; ++p)
          thread.add_outputs(begin, by_group.rows + at, m, parts.first(g, p), parts.count(p), hidden_of(at, m, p), outputs);
      }
#pragma omp barrier
    }
  }
}

void ffn_forward(const midl::FfnForward& call) {
  const double work = double(call.rows) * double(call.selected_groups) * double(call.hidden / call.groups) *
                      double((call.value_weight ? 2 : 1) * call.depth + call.outputs);
  const int threads = int(lesser(call.threads, std::int64_t(work / kThreadWorth) + 1));
  if (threads > 1 && call.rows < threads * kFfnOwnRows)
    ffn_together(call, threads);
  else
    ffn_by_rows(call, threads);
}

FfnLayout layout_of(const midl::FfnPack& call) {
  return {call.depth, call.outputs, call.groups, call.hidden, call.value_weight != nullptr};
}

std::int64_t packed_ffn_size(const midl::FfnPack& call) { return layout_of(call).size; }

void pack_ffn(const midl::FfnPack& call) {
  const FfnLayout layout = layout_of(call);
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1)
  for (std::int64_t g = 0; g < call.groups; ++g) {
    const std::int64_t end = (g + 1) * layout.group_size;
    for (std::int64_t first = g * layout.group_size; first < end; first += kPanelWidth) {
      const int count = int(lesser(end - first, kPanelWidth));
      pack_panel(call.weight + first * call.depth, call.depth, count, call.depth, call.panels + layout.up_panel(first));
      if (call.value_weight)
        pack_panel(call.value_weight + first * call.depth, call.depth, count, call.depth,
                   call.panels + layout.value_panel(first));
      for (std::int64_t o = 0; o < call.outputs; o += kPanelWidth)
        pack_panel(call.down_weight + o * call.hidden + first, call.hidden, int(lesser(call.outputs - o, kPanelWidth)),
                   count, call.panels + layout.down_panel(first, count, o));
    }
  }
}

}  // namespace
