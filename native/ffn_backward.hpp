// Backward pass of an FFN but for its light path and gate: the selected hidden units are computed again, group by group; the
// rest are the products of backward.hpp.
#pragma once

#include "backward.hpp"
#include "ffn.hpp"

namespace {

// act(x) and its derivative.
struct Activated {
  Vec value, slope;
};

MIDL_INLINE Activated activate_with_slope(Vec x, midl::Activation activation) {
  switch (activation) {
    case midl::Activation::relu: return {x < 0.0f ? Vec{} : x, x > 0.0f ? splat(1.0f) : Vec{}};
    case midl::Activation::silu: {
      const Vec s = sigmoid(x);
      return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    case midl::Activation::gelu_tanh: {
      const Vec s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
      return {x * s, s + x * s * (1.0f - s) * (1.5957691216f * (1.0f + 0.134145f * x * x))};
    }
    default: {
      const Vec phi = 0.5f * (1.0f + error_function(0.70710678119f * x));
      return {x * phi, phi + x * (0.39894228040f * exponential(-0.5f * x * x))};
    }
  }
}

// The panel of `count` units whose depth the outputs are: columns of down_weight.
inline void pack_columns(const float* down_weight, std::int64_t hidden, int count, std::int64_t outputs, float* panel) {
  for (int first = 0, lanes; first < count; first += lanes) {
    lanes = sub_panel_lanes<float>(count - first);
    const std::int64_t width = lesser(count - first, lanes);
    float* to = panel + first * outputs;
    for (std::int64_t o = 0; o < outputs; ++o) {
      const float* from = down_weight + o * hidden + first;
      if (lanes < L) {  // folded: two words side by side
        for (int j = 0; j < lanes; ++j) to[o / 2 * L + 2 * j + o % 2] = j < width ? from[j] : 0.0f;
      } else {
        std::int64_t j = 0;
        for (; j + L <= width; j += L) store(to + o * lanes + j, load(from + j));
        for (; j < lanes; ++j) to[o * lanes + j] = j < width ? from[j] : 0.0f;
      }
    }
    if (lanes < L && outputs % 2)
      for (int j = 0; j < lanes; ++j) to[outputs / 2 * L + 2 * j + 1] = 0.0f;
  }
}

// What is behind the members of a group in each of the three products: gradients of the pre-activations and of the values,
// and what the down-projection multiplied.
struct FfnEntries {
  const Members& members;
  float *before, *value, *mixed;
};

class FfnGradients {
 public:
  FfnGradients(const midl::FfnBackward& call, Carver& memory) : call_(call) {
    const std::int64_t rows = lesser(call.rows, kBackwardRows);
    inputs_ = memory.take<const float*>(rows);
    for (float** block : {&before_, &value_, &grad_}) *block = memory.take<float>(rows * kPanelWidth);
    for (float*& vector : vectors_) vector = memory.take<float>(kPanelWidth);
    for (float*& sum : sums_) sum = memory.take<float>(kPanelWidth);
    slice_ = memory.take<float>(slice_floats());
    panel_ = memory.take<float>(kPanelWidth * packed_depth<float>(call.outputs));
  }

  void compute_group(const FfnEntries& entries, std::int64_t group) {
    const UnitParts parts(call_.groups, call_.hidden);
    const std::int64_t begin = entries.members.first[group], end = entries.members.first[group + 1];
    for (std::int64_t e = begin; e < end; ++e) call_.grad_logits[entries.members.slot[e]] = 0;
    for (std::int64_t p = 0; p < parts.per_group; ++p) {
      const std::int64_t first = parts.first(group, p);
      const int count = parts.count(p);
      pack_columns(call_.down_weight + first, call_.hidden, count, call_.outputs, panel_);
      for (float* sum : sums_)
        for (int j = 0; j < kPanelWidth; ++j) sum[j] = 0;
      pad_panel(call_.light_hidden + first, count, vectors_[2]);
      for (std::int64_t e = begin; e < end; e += kBackwardRows)
        compute_units(entries, e, lesser(kBackwardRows, end - e), first, count, first - group * parts.group_size);
      float* const targets[] = {call_.grad_bias, call_.grad_value_bias, call_.grad_light_hidden};
      for (int t = 0; t < 3; ++t)
        for (int j = 0; targets[t] && j < count; ++j) targets[t][first + j] = sums_[t][j];
    }
  }

 private:
  // `offset`: of unit `first` within its group.
  void compute_units(const FfnEntries& entries, std::int64_t e, std::int64_t m, std::int64_t first, int count, std::int64_t offset) {
    const std::int32_t* rows = entries.members.row + e;
    const auto multiply = [&](const float* from, std::int64_t stride, std::int64_t depth, const Neurons<float>& units, const float* bias,
                              float* out) {
      for (std::int64_t r = 0; r < m; ++r) inputs_[r] = from + rows[r] * stride;
      multiply_neurons(inputs_, m, units, depth, bias, slice_, out, kPanelWidth);
    };
    pad_panel(call_.bias ? call_.bias + first : nullptr, count, vectors_[0]);
    multiply(call_.x, call_.x_stride, call_.depth, {call_.weight + first * call_.depth, call_.depth, nullptr, count}, vectors_[0], before_);
    if (call_.value_weight) {
      pad_panel(call_.value_bias ? call_.value_bias + first : nullptr, count, vectors_[1]);
      multiply(call_.x, call_.x_stride, call_.depth, {call_.value_weight + first * call_.depth, call_.depth, nullptr, count}, vectors_[1],
               value_);
    }
    multiply(call_.grad_y, call_.outputs, call_.outputs, {nullptr, 0, panel_, count}, nullptr, grad_);
    const std::int64_t size = call_.hidden / call_.groups;
    for (std::int64_t r = 0; r < m; ++r) {
      const std::int32_t slot = entries.members.slot[e + r];
      const float share = call_.hard ? 1.0f : call_.gate[slot];
      const std::int64_t at = (e + r) * size + offset;
      Vec total = {};
      for (int v = 0; v < count; v += L) {
        const std::int64_t i = r * kPanelWidth + v;
        const Activated unit = activate_with_slope(load(before_ + i), call_.activation);
        const Vec value = call_.value_weight ? load(value_ + i) : splat(1.0f), grad = load(grad_ + i);
        const Vec difference = unit.value * value - load(vectors_[2] + v), scaled = grad * share;
        const Vec before = scaled * value * unit.slope, other = scaled * unit.value;
        // Behind the units lies anything.
        total += (IVec)(lane_numbers() < splat(std::int32_t(count - v))) ? grad * difference : Vec{};
        add(sums_[0] + v, before);
        add(sums_[1] + v, other);
        add(sums_[2] + v, -scaled);
        const std::int64_t width = lesser(L, count - v);
        write(entries.before + at + v, before, width);
        write(entries.mixed + at + v, difference * share, width);
        if (call_.value_weight) write(entries.value + at + v, other, width);
      }
      float sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += total[lane];
      call_.grad_logits[slot] += sum;
    }
  }

  static void add(float* to, Vec v) { store(to, load(to) + v); }
  static void write(float* to, Vec v, std::int64_t width) {
    if (width == L) return store(to, v);
    for (std::int64_t lane = 0; lane < width; ++lane) to[lane] = v[lane];
  }

  const midl::FfnBackward& call_;
  const float** inputs_;
  float *before_, *value_, *grad_, *vectors_[3], *sums_[3], *slice_, *panel_;
};

void ffn_backward(const midl::FfnBackward& call) {
  if (call.rows == 0) return;
  const auto product = [&](const float* x, std::int64_t stride, std::int64_t depth, const float* weight, float* grad_x, float* grad_weight) {
    return midl::LinearBackward{
        .storage = midl::Storage::float32, .grad_y = nullptr, .x = x, .x_stride = stride, .rows = call.rows, .depth = depth,
        .neurons = call.hidden, .rank = 0, .groups = call.groups, .selected_groups = call.selected_groups, .positions = call.rows,
        .span = 1, .weight = weight, .code = nullptr, .light_up = nullptr, .selected = call.selected, .gate = call.gate, .hard = call.hard,
        .grad_light = nullptr, .grad_x = grad_x, .grad_logits = nullptr, .grad_weight = grad_weight, .threads = call.threads};
  };
  const midl::LinearBackward up_call = product(call.x, call.x_stride, call.depth, call.weight, call.grad_x, call.grad_weight);
  const midl::LinearBackward value_call =
      product(call.x, call.x_stride, call.depth, call.value_weight, call.grad_x_of_value, call.grad_value_weight);
  const midl::LinearBackward down_call = product(call.grad_y, call.outputs, call.outputs, nullptr, nullptr, call.grad_down);
  BackwardPlan<float> up(up_call), value(value_call), down(down_call);
  const double work = double(up.entries) * double(up.group_size) * double(call.depth);
  const int threads = work < kThreadWorth ? 1 : call.threads;
  Carver shared(nullptr), own(nullptr);
  const auto carve = [&](Carver& memory) {
    up.carve(memory);
    down.carve(memory);
    if (call.value_weight) value.carve(memory);
  };
  carve(shared);
  FfnGradients(call, own);
  BackwardMemory<float> measure(own, up);
  char* base = midl::scratch(shared.used() + own.used() * std::size_t(threads));
  Carver carver(base);
  carve(carver);
  up.members.fill(up_call, up.blocks);
  down.members = value.members = up.members;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Carver mine(base + shared.used() + own.used() * std::size_t(omp_get_thread_num()));
    FfnGradients gradients(call, mine);
    BackwardMemory<float> memory(mine, up);
    const FfnEntries entries{up.members, up.scaled, value.scaled, down.scaled};
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t g = 0; g < call.groups; ++g) gradients.compute_group(entries, g);
    for (const auto* plan : {&up, &value, &down}) {
      if (plan->call.grad_x) {
#pragma omp for schedule(dynamic, 1) nowait
        for (std::int64_t s = 0; s < kDepthShares; ++s) grad_input(*plan, memory, s);
      }
      if (plan->call.grad_weight) {
#pragma omp for schedule(dynamic, 1) nowait
        for (std::int64_t s = 0; s < kDepthShares; ++s) grad_neurons(*plan, memory, s);
      }
    }
  }
}

}  // namespace
