// The Python module midl._native: tensors arrive as addresses and sizes, so that one build serves every torch version.
// src/midl/ops/native.py checks dtypes, shapes and devices; nothing here does.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "cpu.hpp"
#include "prepared.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using std::int64_t;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

midl::Storage storage_of(bool bfloat16) { return bfloat16 ? midl::Storage::bfloat16 : midl::Storage::float32; }

void linear_forward(bool bfloat16, std::uintptr_t x, int64_t x_stride, int64_t rows, int64_t depth, int64_t neurons,
                    int64_t rank, int64_t groups, int64_t selected_groups, float threshold, int64_t positions, int64_t span,
                    std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t light_down, std::uintptr_t light_up,
                    std::uintptr_t gate_weight, std::uintptr_t gate_bias, std::uintptr_t noise, std::uintptr_t packed_light,
                    std::uintptr_t packed_weight, std::uintptr_t full, bool hard, std::uintptr_t y,
                    std::uintptr_t selected, int threads) {
  midl::current().linear_forward({
      .storage = storage_of(bfloat16),
      .x = pointer<const void>(x), .x_stride = x_stride, .rows = rows, .depth = depth, .neurons = neurons,
      .rank = rank, .groups = groups, .selected_groups = selected_groups, .threshold = threshold,
      .positions = positions, .span = span, .weight = pointer<const void>(weight), .bias = pointer<const void>(bias),
      .light_down = pointer<const void>(light_down), .light_up = pointer<const void>(light_up),
      .gate_weight = pointer<const void>(gate_weight), .gate_bias = pointer<const void>(gate_bias),
      .noise = pointer<const float>(noise), 
      .packed_light = pointer<const void>(packed_light), .packed_weight = pointer<const void>(packed_weight),
      .full = pointer<const void>(full), .hard = hard, .y = pointer<void>(y),
      .selected = pointer<std::int32_t>(selected), .threads = threads,
  });
}

void linear_backward(bool bfloat16, std::uintptr_t grad_y, std::uintptr_t x, int64_t x_stride, int64_t rows, int64_t depth,
                     int64_t neurons, int64_t rank, int64_t groups, int64_t selected_groups, int64_t positions,
                     int64_t span, std::uintptr_t weight, std::uintptr_t code, std::uintptr_t light_up,
                     std::uintptr_t selected, std::uintptr_t gate, bool hard, std::uintptr_t grad_light,
                     std::uintptr_t grad_x, std::uintptr_t grad_logits, std::uintptr_t grad_weight, int threads) {
  midl::current().linear_backward({
      .storage = storage_of(bfloat16), .grad_y = pointer<const void>(grad_y), .x = pointer<const void>(x),
      .x_stride = x_stride, .rows = rows, .depth = depth, .neurons = neurons, .rank = rank, .groups = groups, .selected_groups = selected_groups,
      .positions = positions, .span = span, .weight = pointer<const void>(weight),
      .code = pointer<const float>(code), .light_up = pointer<const float>(light_up),
      .selected = pointer<const std::int32_t>(selected), .gate = pointer<const float>(gate), .hard = hard,
      .grad_light = pointer<void>(grad_light), .grad_x = pointer<float>(grad_x),
      .grad_logits = pointer<float>(grad_logits), .grad_weight = pointer<float>(grad_weight), .threads = threads,
  });
}

void split_gradient(bool bfloat16, std::uintptr_t grad_y, std::uintptr_t difference, int64_t difference_stride, int64_t rows,
                    int64_t neurons, int64_t groups, int64_t selected_groups, int64_t positions, int64_t span,
                    std::uintptr_t selected, std::uintptr_t gate, bool hard, std::uintptr_t grad_full,
                    int64_t grad_full_stride, std::uintptr_t grad_light, std::uintptr_t grad_logits, int threads) {
  midl::current().split_gradient({
      .storage = storage_of(bfloat16), .grad_y = pointer<const void>(grad_y), .difference = pointer<const void>(difference),
      .difference_stride = difference_stride, .rows = rows, .neurons = neurons, .groups = groups,
      .selected_groups = selected_groups, .positions = positions, .span = span,
      .selected = pointer<const std::int32_t>(selected), .gate = pointer<const float>(gate), .hard = hard,
      .grad_full = pointer<void>(grad_full), .grad_full_stride = grad_full_stride,
      .grad_light = pointer<void>(grad_light), .grad_logits = pointer<float>(grad_logits), .threads = threads,
  });
}

void projection(bool bfloat16, std::uintptr_t x, int64_t x_stride, int64_t rows, int64_t depth, int64_t neurons,
                std::uintptr_t weight, std::uintptr_t y, int threads) {
  midl::current().projection({storage_of(bfloat16), pointer<const void>(x), x_stride, rows, depth, neurons,
                              pointer<const void>(weight), pointer<float>(y), threads});
}

void projection_backward(bool bfloat16, std::uintptr_t grad_y, std::uintptr_t x, int64_t x_stride, int64_t rows,
                         int64_t depth, int64_t neurons, std::uintptr_t weight, std::uintptr_t grad_x, bool accumulate,
                         std::uintptr_t grad_weight, int threads) {
  midl::current().projection_backward({storage_of(bfloat16), pointer<const void>(grad_y), pointer<const void>(x), x_stride,
                                       rows, depth, neurons, pointer<const void>(weight), pointer<float>(grad_x), accumulate,
                                       pointer<float>(grad_weight), threads});
}

// The fields of Images, in their order.
using Geometry = std::array<int64_t, 17>;

midl::Images images_of(const Geometry& g) {
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15], g[16]};
}

void convolution_forward(bool bfloat16, std::uintptr_t x, const Geometry& images, int64_t rows, int64_t neurons,
                         int64_t rank, int64_t groups, int64_t selected_groups, float threshold, int64_t positions,
                         int64_t span, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t light_up,
                         bool projection, std::uintptr_t gate_bias, std::uintptr_t noise, std::uintptr_t packed_light,
                         std::uintptr_t packed_weight, std::uintptr_t full, bool hard, std::uintptr_t y, std::uintptr_t selected, int threads) {
  midl::current().convolution_forward({
      .storage = storage_of(bfloat16),
      .images = images_of(images),
      .rows = {
          .storage = midl::Storage::float32, .x = pointer<const void>(x), .x_stride = 0, .rows = rows,
          .depth = images[0] * images[7] * images[8], .neurons = neurons, .rank = rank, .groups = groups,
          .selected_groups = selected_groups, .threshold = threshold, .positions = positions, .span = span,
          .weight = pointer<const void>(weight), .bias = pointer<const void>(bias),
          // Never read: panels take its place, as they take that of the gate's weights.
          .light_down = pointer<const void>(packed_light), .light_up = pointer<const void>(light_up),
          .gate_weight = projection ? pointer<const void>(packed_light) : nullptr,
          .gate_bias = pointer<const void>(gate_bias), .noise = pointer<const float>(noise),
          .packed_light = pointer<const void>(packed_light), .packed_weight = pointer<const void>(packed_weight),
          .full = pointer<const void>(full), .hard = hard, .y = pointer<void>(y), .selected = pointer<std::int32_t>(selected), .threads = threads,
      },
  });
}

void convolution_code(bool bfloat16, std::uintptr_t x, const Geometry& images, int64_t rows, int64_t rank, std::uintptr_t light_down,
                      std::uintptr_t code, int threads) {
  midl::current().convolution_code({storage_of(bfloat16), images_of(images), pointer<const void>(x), rows, rank,
                                    pointer<const void>(light_down), pointer<float>(code), threads});
}

void convolution_backward(bool bfloat16, std::uintptr_t x, const Geometry& images, std::uintptr_t grad_y, int64_t rows,
                          int64_t neurons, int64_t rank, int64_t groups, int64_t selected_groups, int64_t positions,
                          int64_t span, std::uintptr_t weight, std::uintptr_t selected, std::uintptr_t gate,
                          std::uintptr_t code, std::uintptr_t light_up, bool hard, std::uintptr_t grad_light,
                          std::uintptr_t grad_x, bool accumulate, std::uintptr_t grad_logits,
                          std::uintptr_t grad_weight, int threads) {
  midl::current().convolution_backward({
      .storage = storage_of(bfloat16), .images = images_of(images), .x = pointer<const void>(x),
      .grad_y = pointer<const void>(grad_y), .rows = rows, .neurons = neurons, .rank = rank, .groups = groups, .selected_groups = selected_groups, .positions = positions,
      .span = span, .weight = pointer<const void>(weight), .selected = pointer<const std::int32_t>(selected),
      .gate = pointer<const float>(gate), .code = pointer<const float>(code),
      .light_up = pointer<const float>(light_up), .hard = hard, .grad_light = pointer<void>(grad_light),
      .grad_x = pointer<float>(grad_x), .accumulate = accumulate, .grad_logits = pointer<float>(grad_logits),
      .grad_weight = pointer<float>(grad_weight), .threads = threads,
  });
}

std::pair<int64_t, int64_t> packed_sizes(bool bfloat16, int64_t depth, int64_t neurons, int64_t rank, int64_t groups) {
  const midl::PackedSizes sizes = midl::current().packed_sizes(
      {.storage = storage_of(bfloat16), .depth = depth, .neurons = neurons, .rank = rank, .groups = groups});
  return {sizes.light, sizes.weight};
}

bool wants_weight_panels(bool bfloat16, int64_t rows, int64_t depth, int64_t groups, int64_t selected_groups,
                         int64_t group_size, bool convolution) {
  return midl::current().wants_weight_panels(storage_of(bfloat16), rows, depth, groups, selected_groups, group_size, convolution);
}

bool backward_picks(bool bfloat16, int64_t rows, int64_t groups, int64_t selected_groups, int64_t group_size) {
  return midl::current().backward_picks(storage_of(bfloat16), rows, groups, selected_groups, group_size);
}

void pack(bool bfloat16, int64_t depth, int64_t neurons, int64_t rank, int64_t groups, std::uintptr_t weight,
          std::uintptr_t light_down, std::uintptr_t light_up, std::uintptr_t gate_weight, std::uintptr_t packed_light,
          std::uintptr_t packed_weight, int threads) {
  midl::current().pack({
      .storage = storage_of(bfloat16),
      .depth = depth, .neurons = neurons, .rank = rank, .groups = groups, .weight = pointer<const void>(weight),
      .light_down = pointer<const void>(light_down), .light_up = pointer<const void>(light_up),
      .gate_weight = pointer<const void>(gate_weight), .packed_light = pointer<void>(packed_light),
      .packed_weight = pointer<void>(packed_weight), .threads = threads,
  });
}

void topk(std::uintptr_t scores, int64_t rows, int64_t groups, int64_t k, float threshold, std::uintptr_t selected,
          int threads) {
  midl::current().topk(
      {pointer<const float>(scores), rows, groups, k, threshold, pointer<std::int32_t>(selected), threads});
}

void ffn_forward(bool bfloat16, std::uintptr_t x, int64_t x_stride, int64_t rows, int64_t depth, int64_t hidden, int64_t outputs,
                 int64_t rank, int64_t groups, int64_t selected_groups, float threshold, std::uintptr_t weight, std::uintptr_t bias,
                 std::uintptr_t value_weight, std::uintptr_t value_bias, std::uintptr_t down_weight, std::uintptr_t down_bias,
                 std::uintptr_t light_down, std::uintptr_t light_up, std::uintptr_t light_hidden, std::uintptr_t light_bias,
                 std::uintptr_t gate_weight, std::uintptr_t gate_bias, std::uintptr_t noise, std::uintptr_t panels, bool hard,
                 int activation, std::uintptr_t y, std::uintptr_t selected, int threads) {
  midl::current().ffn_forward({
      .storage = storage_of(bfloat16), .x = pointer<const void>(x), .x_stride = x_stride, .rows = rows, .depth = depth, .hidden = hidden,
      .outputs = outputs, .rank = rank, .groups = groups, .selected_groups = selected_groups, .threshold = threshold,
      .weight = pointer<const void>(weight), .bias = pointer<const void>(bias),
      .value_weight = pointer<const void>(value_weight), .value_bias = pointer<const void>(value_bias),
      .down_weight = pointer<const void>(down_weight), .down_bias = pointer<const void>(down_bias),
      .light_down = pointer<const void>(light_down), .light_up = pointer<const void>(light_up),
      .light_hidden = pointer<const void>(light_hidden), .light_bias = pointer<const void>(light_bias),
      .gate_weight = pointer<const void>(gate_weight), .gate_bias = pointer<const void>(gate_bias),
      .noise = pointer<const float>(noise), .panels = pointer<const void>(panels), .hard = hard,
      .activation = midl::Activation(activation), .y = pointer<void>(y), .selected = pointer<std::int32_t>(selected),
      .threads = threads,
  });
}

void ffn_backward(std::uintptr_t grad_y, std::uintptr_t x, int64_t x_stride, int64_t rows, int64_t depth, int64_t hidden, int64_t outputs,
                  int64_t groups, int64_t selected_groups, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t value_weight,
                  std::uintptr_t value_bias, std::uintptr_t down_weight, std::uintptr_t light_hidden, std::uintptr_t selected,
                  std::uintptr_t gate, bool hard, int activation, std::uintptr_t grad_x, std::uintptr_t grad_x_of_value,
                  std::uintptr_t grad_weight, std::uintptr_t grad_value_weight, std::uintptr_t grad_down, std::uintptr_t grad_bias,
                  std::uintptr_t grad_value_bias, std::uintptr_t grad_light_hidden, std::uintptr_t grad_logits, int threads) {
  midl::current().ffn_backward({
      .grad_y = pointer<const float>(grad_y), .x = pointer<const float>(x), .x_stride = x_stride, .rows = rows, .depth = depth,
      .hidden = hidden, .outputs = outputs, .groups = groups, .selected_groups = selected_groups,
      .weight = pointer<const float>(weight), .bias = pointer<const float>(bias),
      .value_weight = pointer<const float>(value_weight), .value_bias = pointer<const float>(value_bias),
      .down_weight = pointer<const float>(down_weight), .light_hidden = pointer<const float>(light_hidden),
      .selected = pointer<const std::int32_t>(selected), .gate = pointer<const float>(gate), .hard = hard,
      .activation = midl::Activation(activation), .grad_x = pointer<float>(grad_x),
      .grad_x_of_value = pointer<float>(grad_x_of_value), .grad_weight = pointer<float>(grad_weight),
      .grad_value_weight = pointer<float>(grad_value_weight), .grad_down = pointer<float>(grad_down),
      .grad_bias = pointer<float>(grad_bias), .grad_value_bias = pointer<float>(grad_value_bias),
      .grad_light_hidden = pointer<float>(grad_light_hidden), .grad_logits = pointer<float>(grad_logits), .threads = threads,
  });
}

int64_t packed_ffn_size(bool bfloat16, int64_t depth, int64_t hidden, int64_t outputs, int64_t rank, int64_t groups, bool gated) {
  const float any = 0;
  return midl::current().packed_ffn_size({.storage = storage_of(bfloat16), .depth = depth, .hidden = hidden, .outputs = outputs, .rank = rank, .groups = groups,
                                          .value_weight = gated ? &any : nullptr});
}

void pack_ffn(bool bfloat16, int64_t depth, int64_t hidden, int64_t outputs, int64_t rank, int64_t groups, std::uintptr_t weight,
              std::uintptr_t value_weight, std::uintptr_t down_weight, std::uintptr_t light_down, std::uintptr_t light_up,
              std::uintptr_t gate_weight, std::uintptr_t panels, int threads) {
  midl::current().pack_ffn({.storage = storage_of(bfloat16), .depth = depth, .hidden = hidden, .outputs = outputs, .rank = rank, .groups = groups,
                            .weight = pointer<const void>(weight), .value_weight = pointer<const void>(value_weight),
                            .down_weight = pointer<const void>(down_weight), .light_down = pointer<const void>(light_down),
                            .light_up = pointer<const void>(light_up), .gate_weight = pointer<const void>(gate_weight),
                            .panels = pointer<void>(panels), .threads = threads});
}

std::vector<std::string> names(bool supported_only) {
  std::vector<std::string> list;
  for (const midl::Variant& variant : midl::variants())
    if (variant.supported || !supported_only) list.push_back(variant.kernels->name);
  return list;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of midl; called by midl.ops.native.";
  m.attr("interface") = MIDL_INTERFACE;
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("linear_forward", &linear_forward, released, "bfloat16"_a, "x"_a, "x_stride"_a, "rows"_a, "depth"_a,
        "neurons"_a, "rank"_a, "groups"_a, "selected_groups"_a, "threshold"_a, "positions"_a, "span"_a, "weight"_a,
        "bias"_a, "light_down"_a, "light_up"_a, "gate_weight"_a, "gate_bias"_a, "noise"_a, "packed_light"_a,
        "packed_weight"_a, "full"_a, "hard"_a, "y"_a, "selected"_a, "threads"_a);
  m.def("linear_backward", &linear_backward, released, "bfloat16"_a, "grad_y"_a, "x"_a, "x_stride"_a, "rows"_a, "depth"_a,
        "neurons"_a, "rank"_a, "groups"_a, "selected_groups"_a, "positions"_a, "span"_a, "weight"_a, "code"_a,
        "light_up"_a, "selected"_a, "gate"_a, "hard"_a, "grad_light"_a, "grad_x"_a, "grad_logits"_a, "grad_weight"_a,
        "threads"_a);
  m.def("split_gradient", &split_gradient, released, "bfloat16"_a, "grad_y"_a, "difference"_a, "difference_stride"_a, "rows"_a,
        "neurons"_a, "groups"_a, "selected_groups"_a, "positions"_a, "span"_a, "selected"_a, "gate"_a, "hard"_a, "grad_full"_a,
        "grad_full_stride"_a, "grad_light"_a, "grad_logits"_a, "threads"_a);
  m.def("projection", &projection, released, "bfloat16"_a, "x"_a, "x_stride"_a, "rows"_a, "depth"_a, "neurons"_a, "weight"_a,
        "y"_a, "threads"_a);
  m.def("projection_backward", &projection_backward, released, "bfloat16"_a, "grad_y"_a, "x"_a, "x_stride"_a, "rows"_a,
        "depth"_a, "neurons"_a, "weight"_a, "grad_x"_a, "accumulate"_a, "grad_weight"_a, "threads"_a);
  m.def("convolution_forward", &convolution_forward, released, "bfloat16"_a, "x"_a, "images"_a, "rows"_a, "neurons"_a,
        "rank"_a, "groups"_a, "selected_groups"_a, "threshold"_a, "positions"_a, "span"_a, "weight"_a, "bias"_a,
        "light_up"_a, "projection"_a, "gate_bias"_a, "noise"_a, "packed_light"_a, "packed_weight"_a, "full"_a,
        "hard"_a, "y"_a, "selected"_a, "threads"_a);
  m.def("convolution_code", &convolution_code, released, "bfloat16"_a, "x"_a, "images"_a, "rows"_a, "rank"_a, "light_down"_a, "code"_a,
        "threads"_a);
  m.def("convolution_backward", &convolution_backward, released, "bfloat16"_a, "x"_a, "images"_a, "grad_y"_a, "rows"_a, "neurons"_a,
        "rank"_a, "groups"_a, "selected_groups"_a, "positions"_a, "span"_a, "weight"_a, "selected"_a, "gate"_a,
        "code"_a, "light_up"_a, "hard"_a, "grad_light"_a, "grad_x"_a, "accumulate"_a, "grad_logits"_a, "grad_weight"_a,
        "threads"_a);
  m.def("packed_sizes", &packed_sizes, "bfloat16"_a, "depth"_a, "neurons"_a, "rank"_a, "groups"_a);
  m.def("wants_weight_panels", &wants_weight_panels, "bfloat16"_a, "rows"_a, "depth"_a, "groups"_a, "selected_groups"_a,
        "group_size"_a, "convolution"_a);
  m.def("backward_picks", &backward_picks, "bfloat16"_a, "rows"_a, "groups"_a, "selected_groups"_a, "group_size"_a);
  m.def("pack", &pack, released, "bfloat16"_a, "depth"_a, "neurons"_a, "rank"_a, "groups"_a, "weight"_a,
        "light_down"_a, "light_up"_a, "gate_weight"_a, "packed_light"_a, "packed_weight"_a, "threads"_a);
  m.def("topk", &topk, released, "scores"_a, "rows"_a, "groups"_a, "k"_a, "threshold"_a, "selected"_a, "threads"_a);
  m.def("ffn_forward", &ffn_forward, released, "bfloat16"_a, "x"_a, "x_stride"_a, "rows"_a, "depth"_a, "hidden"_a, "outputs"_a, "rank"_a,
        "groups"_a, "selected_groups"_a, "threshold"_a, "weight"_a, "bias"_a, "value_weight"_a, "value_bias"_a, "down_weight"_a,
        "down_bias"_a, "light_down"_a, "light_up"_a, "light_hidden"_a, "light_bias"_a, "gate_weight"_a, "gate_bias"_a, "noise"_a,
        "panels"_a, "hard"_a, "activation"_a, "y"_a, "selected"_a, "threads"_a);
  m.def("ffn_backward", &ffn_backward, released, "grad_y"_a, "x"_a, "x_stride"_a, "rows"_a, "depth"_a, "hidden"_a, "outputs"_a,
        "groups"_a, "selected_groups"_a, "weight"_a, "bias"_a, "value_weight"_a, "value_bias"_a, "down_weight"_a, "light_hidden"_a,
        "selected"_a, "gate"_a, "hard"_a, "activation"_a, "grad_x"_a, "grad_x_of_value"_a, "grad_weight"_a, "grad_value_weight"_a,
        "grad_down"_a, "grad_bias"_a, "grad_value_bias"_a, "grad_light_hidden"_a, "grad_logits"_a, "threads"_a);
  m.attr("ffn_panel_group") = midl::kFfnPanelGroup;
  m.def("packed_ffn_size", &packed_ffn_size, "bfloat16"_a, "depth"_a, "hidden"_a, "outputs"_a, "rank"_a, "groups"_a, "gated"_a);
  m.def("pack_ffn", &pack_ffn, released, "bfloat16"_a, "depth"_a, "hidden"_a, "outputs"_a, "rank"_a, "groups"_a, "weight"_a, "value_weight"_a,
        "down_weight"_a, "light_down"_a, "light_up"_a, "gate_weight"_a, "panels"_a, "threads"_a);
  m.def("sample", &midl::sample, "data"_a, "bytes"_a);
  midl::bind_prepared(m);
  m.def("use_instruction_set", &midl::use_variant, "name"_a);
  m.def("dot_pairs", [] { return midl::current().dot_pairs; });
  m.def("instruction_set", [] { return std::string(midl::current().name); });
  m.def("supported_instruction_sets", [] { return names(true); });
  m.def("built_instruction_sets", [] { return names(false); });
}
