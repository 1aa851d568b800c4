// The sparse part of an FFN: per group of hidden units and the rows that chose it, the up-projection, the activation and
// the group's share of the output. Hidden units live in scratch memory for one panel at a time; code, gate and light
// path are the caller's, which hands over y with the light path in it.
#pragma once

#include "forward.hpp"

namespace {

// Rows that share the packing of a panel; their outputs should stay in cache.
constexpr std::int64_t kFfnRows = 256;

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

class FfnChunk {
 public:
  explicit FfnChunk(const midl::FfnForward& call)
      : call_(call), layout_(call.depth, call.outputs, call.groups, call.hidden, call.value_weight) {}

  void carve(Carver& memory, std::int64_t rows) {
    by_group_.starts = memory.take<std::int32_t>(call_.groups + 1);
    by_group_.rows = memory.take<std::int32_t>(rows * call_.selected_groups);
    by_group_.shares = memory.take<float>(rows * call_.selected_groups);
    inputs_ = memory.take<const float*>(rows);
    units_ = memory.take<const float*>(rows);
    hidden_ = memory.take<float>(rows * kPanelWidth);
    value_ = memory.take<float>(rows * kPanelWidth);
    out_ = memory.take<float>(rows * kPanelWidth);
    slice_ = memory.take<float>(slice_floats());
    for (float*& vector : vectors_) vector = memory.take<float>(kPanelWidth);
  }

  void run(Range chunk) {
    sort_rows(call_, chunk, by_group_);
    const std::int64_t size = call_.hidden / call_.groups;
    for (std::int64_t g = 0; g < call_.groups; ++g) {
      const std::int64_t begin = by_group_.starts[g], m = by_group_.starts[g + 1] - begin;
      if (m == 0) continue;
      for (std::int64_t r = 0; r < m; ++r) {
        inputs_[r] = call_.x + (chunk.begin + by_group_.rows[begin + r]) * call_.x_stride;
        units_[r] = hidden_ + r * kPanelWidth;
      }
      for (std::int64_t first = g * size; first < (g + 1) * size; first += kPanelWidth) {
        const int count = int(lesser((g + 1) * size - first, kPanelWidth));
        compute_units(m, first, count, by_group_.shares + begin);
        add_outputs(chunk.begin, m, first, count, by_group_.rows + begin);
      }
    }
  }

 private:
  // hidden (m x count) = share * (act(x . weight) [* x . value] - light)
  void compute_units(std::int64_t m, std::int64_t first, int count, const float* shares) {
    const auto project = [&](const float* weight, std::int64_t panel, const float* bias, float* padded, float* out) {
      pad_panel(bias ? bias + first : nullptr, count, padded);
      const Neurons<float> units{weight + first * call_.depth, call_.depth, panel_at(panel), count};
      multiply_neurons(inputs_, m, units, call_.depth, padded, slice_, out, kPanelWidth);
    };
    project(call_.weight, layout_.up_panel(first), call_.bias, vectors_[0], hidden_);
    if (call_.value_weight)
      project(call_.value_weight, layout_.value_panel(first), call_.value_bias, vectors_[1], value_);
    pad_panel(call_.light_hidden + first, count, vectors_[2]);
    for (std::int64_t r = 0; r < m; ++r)
      for (int v = 0; v < count; v += L) {
        float* unit = hidden_ + r * kPanelWidth + v;
        Vec h = activate(load(unit), call_.activation);
        if (call_.value_weight) h *= load(value_ + r * kPanelWidth + v);
        store(unit, (h - load(vectors_[2] + v)) * shares[r]);
      }
  }

  // y (the m rows) += hidden . down^T
  void add_outputs(std::int64_t chunk_begin, std::int64_t m, std::int64_t first, int count, const std::int32_t* rows) {
    for (std::int64_t o = 0; o < call_.outputs; o += kPanelWidth) {
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

  const float* panel_at(std::int64_t offset) const { return call_.panels ? call_.panels + offset : nullptr; }

  const midl::FfnForward& call_;
  const FfnLayout layout_;
  RowsByGroup by_group_{};
  const float **inputs_ = nullptr, **units_ = nullptr;
  float *hidden_ = nullptr, *value_ = nullptr, *out_ = nullptr, *slice_ = nullptr, *vectors_[3] = {};
};

void ffn_forward(const midl::FfnForward& call) {
  const double work = double(call.rows) * double(call.selected_groups) * double(call.hidden / call.groups) *
                      double((call.value_weight ? 2 : 1) * call.depth + call.outputs);
  const int wanted = int(lesser(call.threads, std::int64_t(work / kThreadWorth) + 1));
#pragma omp parallel num_threads(wanted) if (wanted > 1)
  {
    const Range own = part_of(call.rows, omp_get_thread_num(), omp_get_num_threads(), 1);
    const std::int64_t room = lesser(own.end - own.begin, kFfnRows);
    FfnChunk chunk(call);
    Carver sizes(nullptr);
    chunk.carve(sizes, room);
    Carver memory(midl::scratch(sizes.used()));
    chunk.carve(memory, room);
    for (std::int64_t begin = own.begin; begin < own.end; begin += kFfnRows)
      chunk.run({begin, lesser(own.end, begin + kFfnRows)});
  }
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
