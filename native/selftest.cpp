// The kernels of every instruction set against plain loops in double precision, without Python or torch: for emulators,
// cross-compiled builds and sanitizers, where those are slow or not to be had. The tests in tests/ops go further.
//
//     selftest [instruction set ...]      all that this processor runs, if none is named
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.hpp"

using midl::Kernels;
using midl::Storage;
using std::int64_t;
using std::vector;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint16_t kPoison = 0x7fc1;  // NaN as bfloat16, and both halves of a NaN as float
constexpr double kForwardLimit[] = {2e-6, 3e-3}, kBackwardLimit[] = {1e-5, 1e-2};  // by storage, relative root-mean-square

int failures = 0, checks = 0;

std::uint64_t state = 1;
float draw() {  // roughly normal
  float total = 0;
  for (int i = 0; i < 4; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    total += float(state >> 40) * 0x1p-24f;
  }
  return (total - 2) * 1.7f;
}

// A tensor as the kernels get it, in either storage, behind it a strip that nobody may touch; and its values.
struct Tensor {
  Storage storage;
  int64_t count;
  vector<std::uint16_t> halves;

  Tensor(Storage s, int64_t n) : storage(s), count(n), halves(std::size_t(n * width() + kStrip), kPoison) {}
  static Tensor random(Storage s, int64_t n, float scale = 1) {
    Tensor t(s, n);
    for (int64_t i = 0; i < n; ++i) t.set(i, draw() * scale);
    return t;
  }
  static Tensor random(int64_t n) { return random(Storage::float32, n); }

  int width() const { return storage == Storage::float32 ? 2 : 1; }
  void* data() { return halves.data(); }
  template <class T>
  T* as() { return reinterpret_cast<T*>(halves.data()); }
  float operator[](int64_t i) const {
    std::uint32_t bits = 0;
    if (storage == Storage::float32)
      std::memcpy(&bits, halves.data() + 2 * i, 4);
    else
      bits = std::uint32_t(halves[std::size_t(i)]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void set(int64_t i, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (storage == Storage::float32)
      std::memcpy(halves.data() + 2 * i, &bits, 4);
    else
      halves[std::size_t(i)] = std::uint16_t((bits + 0x8000u) >> 16);
  }
  bool strip_is_whole() const {
    return std::all_of(halves.end() - kStrip, halves.end(), [](std::uint16_t h) { return h == kPoison; });
  }
  static constexpr int kStrip = 64;
};

bool report(bool good, const char* name, const char* what, const std::string& where) {
  ++checks;
  if (!good) {
    ++failures;
    std::printf("FAILED %s: %s, %s\n", name, what, where.c_str());
  }
  return good;
}

double error_ratio(const Tensor& actual, const vector<double>& expected) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double d = actual[int64_t(i)] - expected[i];
    error += d * d, size += expected[i] * expected[i];
  }
  return size == 0 ? std::sqrt(error) : std::sqrt(error / size);
}

void compare(const Kernels& kernels, const Tensor& actual, const vector<double>& expected, double limit, const char* what,
             const std::string& where) {
  const double ratio = error_ratio(actual, expected);
  char text[200];
  std::snprintf(text, sizeof text, "%s: error %.3g, limit %.3g", what, ratio, limit);
  report(ratio < limit, kernels.name, text, where);
  report(actual.strip_is_whole(), kernels.name, "wrote past the end", where + what);
}

constexpr float kNone = -std::numeric_limits<float>::infinity();  // every score reaches this threshold

// The k largest, ties to the lowest index, NaN as the least; behind the first only those that reach the threshold, then -1.
vector<std::int32_t> top(const vector<double>& scores, int64_t k, double threshold) {
  vector<std::int32_t> order(scores.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = std::int32_t(i);
  const auto value = [&](std::int32_t i) {
    const double s = scores[std::size_t(i)];
    return std::isnan(s) ? -std::numeric_limits<double>::infinity() : s;
  };
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return value(a) > value(b); });
  order.resize(std::size_t(k));
  const auto end = std::find_if(order.begin() + 1, order.end(), [&](std::int32_t i) { return value(i) < threshold; });
  std::sort(order.begin(), end);
  std::fill(end, order.end(), -1);
  return order;
}

void test_topk(const Kernels& kernels, int64_t groups, int kind, float threshold) {
  const int64_t rows = 3, k = std::max<int64_t>(1, groups * 45 / 100);
  Tensor scores = Tensor::random(rows * groups);
  for (int64_t i = 0; i < rows * groups; ++i) {
    if (kind == 1) scores.set(i, std::round(scores[i]));
    if (kind == 2 && i % 3) scores.set(i, i % 3 == 1 ? kNaN : -std::numeric_limits<float>::infinity());
  }
  vector<std::int32_t> selected(std::size_t(rows * k), -2);
  kernels.topk({scores.as<float>(), rows, groups, k, threshold, selected.data(), 1});
  for (int64_t r = 0; r < rows; ++r) {
    vector<double> row;
    for (int64_t g = 0; g < groups; ++g) row.push_back(scores[r * groups + g]);
    const auto expected = top(row, k, threshold);
    report(std::equal(expected.begin(), expected.end(), selected.begin() + r * k), kernels.name, "Top-k",
           std::to_string(groups) + " groups, kind " + std::to_string(kind) + ", threshold " + std::to_string(threshold));
  }
}

void test_topk(const Kernels& kernels) {
  for (const int64_t groups : {1, 2, 15, 16, 17, 33, 100, 1000})
    for (const int kind : {0, 1, 2})
      for (const float threshold : {kNone, -1.0f, 1.0f, 100.0f, -kNone}) test_topk(kernels, groups, kind, threshold);
}

struct Shape {
  int64_t rows, depth, groups, group_size, rank, k, span;
  int64_t neurons() const { return groups * group_size; }
  int64_t blocks() const { return (rows + span - 1) / span; }  // one sequence
};

struct Case {
  Shape shape;
  Storage storage;
  bool light_gate, hard;
  float threshold;
  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof text, "rows %d depth %d groups %d x %d rank %d k %d span %d %s%s%s threshold %g", int(shape.rows),
                  int(shape.depth), int(shape.groups), int(shape.group_size), int(shape.rank), int(shape.k),
                  int(shape.span), storage == Storage::float32 ? "float32" : "bfloat16", light_gate ? " light gate" : "",
                  hard ? " hard" : "", double(threshold));
    return text;
  }
};

// What the layer computes, in double precision from the stored values.
struct Layer {
  Shape s;
  Tensor x, weight, bias, light_down, light_up, gate_weight, gate_bias;
  bool light_gate, hard;
  float threshold;
  vector<double> code, light, full, logits, y;
  vector<std::int32_t> selected;

  explicit Layer(const Case& c) : Layer(c, Tensor::random(c.storage, c.shape.rows * c.shape.depth)) {}
  Layer(const Case& c, Tensor inputs)
      : s(c.shape), x(std::move(inputs)),
        weight(Tensor::random(c.storage, s.neurons() * s.depth, scale(s.depth))), bias(Tensor::random(c.storage, s.neurons())),
        light_down(Tensor::random(c.storage, s.rank * s.depth, scale(s.depth))),
        light_up(Tensor::random(c.storage, s.neurons() * s.rank, scale(s.rank))),
        gate_weight(Tensor::random(c.storage, s.groups * s.rank, scale(s.rank))),
        gate_bias(Tensor::random(c.storage, s.groups)), light_gate(c.light_gate), hard(c.hard),
        threshold(c.threshold) {
    code = product(x, light_down, s.rows, s.rank, s.depth);
    full = product(x, weight, s.rows, s.neurons(), s.depth);
    light.assign(std::size_t(s.rows * s.neurons()), 0);
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t j = 0; j < s.neurons(); ++j)
        for (int64_t i = 0; i < s.rank; ++i)
          light[std::size_t(r * s.neurons() + j)] += code[std::size_t(r * s.rank + i)] * light_up[j * s.rank + i];
    select();
    y.resize(light.size());
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t j = 0; j < s.neurons(); ++j) {
        const std::size_t at = std::size_t(r * s.neurons() + j);
        y[at] = light[at] + weight_of(r, j / s.group_size) * (full[at] - light[at]) + bias[j];
      }
  }

  static float scale(int64_t terms) { return 1 / std::sqrt(float(terms)); }
  static vector<double> product(const Tensor& a, const Tensor& b, int64_t m, int64_t n, int64_t depth) {
    vector<double> c(std::size_t(m * n), 0.0);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < depth; ++i) c[std::size_t(r * n + j)] += double(a[r * depth + i]) * b[j * depth + i];
    return c;
  }

  void select() {
    for (int64_t b = 0; b < s.blocks(); ++b) {
      const int64_t begin = b * s.span, end = std::min(s.rows, begin + s.span);
      vector<double> row;
      for (int64_t g = 0; g < s.groups; ++g) {
        double logit = 0;
        for (int64_t r = begin; r < end; ++r) {
          if (light_gate)
            for (int64_t j = g * s.group_size; j < (g + 1) * s.group_size; ++j)
              logit += (light[std::size_t(r * s.neurons() + j)] + bias[j]) / double(s.group_size);
          else
            for (int64_t i = 0; i < s.rank; ++i)
              logit += code[std::size_t(r * s.rank + i)] * gate_weight[g * s.rank + i];
        }
        logit /= double(end - begin);
        row.push_back(light_gate ? logit : logit + gate_bias[g]);
      }
      logits.insert(logits.end(), row.begin(), row.end());
      const auto chosen = top(row, s.k, threshold);
      selected.insert(selected.end(), chosen.begin(), chosen.end());
    }
  }

  double gate(int64_t block, int64_t group) const { return 1 / (1 + std::exp(-logits[std::size_t(block * s.groups + group)])); }
  bool chosen(int64_t block, int64_t group) const {
    const auto begin = selected.begin() + block * s.k;
    return std::find(begin, begin + s.k, std::int32_t(group)) != begin + s.k;
  }
  double weight_of(int64_t row, int64_t group) const {
    const int64_t block = row / s.span;
    return !chosen(block, group) ? 0 : hard ? 1 : gate(block, group);
  }
};

void test_forward(const Kernels& kernels, const Case& c) {
  Layer layer(c);
  const Shape& s = c.shape;
  const midl::LinearPack parameters{
      .storage = c.storage, .depth = s.depth, .neurons = s.neurons(), .rank = s.rank, .groups = s.groups,
      .weight = layer.weight.data(), .light_down = layer.light_down.data(), .light_up = layer.light_up.data(),
      .gate_weight = c.light_gate ? nullptr : layer.gate_weight.data(), .packed_light = nullptr,
      .packed_weight = nullptr, .threads = 1};
  const midl::PackedSizes sizes = kernels.packed_sizes(parameters);
  Tensor packed_light(c.storage, sizes.light), packed_weight(c.storage, sizes.weight);
  vector<std::uint16_t> first;
  for (const bool packed : {false, true}) {
    if (packed) {
      midl::LinearPack call = parameters;
      call.packed_light = packed_light.data();
      if (kernels.wants_weight_panels(c.storage, s.rows, s.depth, s.groups, s.k, s.group_size, false)) call.packed_weight = packed_weight.data();
      kernels.pack(call);
    }
    Tensor y(c.storage, s.rows * s.neurons());
    vector<std::int32_t> selected(std::size_t(s.blocks() * s.k), -2);
    const bool weight_panels = packed && kernels.wants_weight_panels(c.storage, s.rows, s.depth, s.groups, s.k, s.group_size, false);
    midl::LinearForward call{
        .storage = c.storage, .x = layer.x.data(), .x_stride = s.depth, .rows = s.rows, .depth = s.depth,
        .neurons = s.neurons(), .rank = s.rank, .groups = s.groups, .selected_groups = s.k, .threshold = c.threshold,
        .positions = s.rows, .span = s.span, .weight = layer.weight.data(), .bias = layer.bias.data(),
        .light_down = layer.light_down.data(), .light_up = layer.light_up.data(),
        .gate_weight = parameters.gate_weight, .gate_bias = c.light_gate ? nullptr : layer.gate_bias.data(),
        .noise = nullptr, .packed_light = packed ? packed_light.data() : nullptr,
        .packed_weight = weight_panels ? packed_weight.data() : nullptr, .full = nullptr, .hard = c.hard, .y = y.data(),
        .selected = selected.data(), .threads = 1};
    kernels.linear_forward(call);
    const std::string where = c.describe() + (packed ? ", packed" : "");
    if (report(selected == layer.selected, kernels.name, "selection", where))
      compare(kernels, y, layer.y, kForwardLimit[int(c.storage)], "output", where);
    if (packed) report(y.halves == first, kernels.name, "not the same bits with panels", where);
    first = y.halves;
    Tensor rectified(c.storage, s.rows * s.neurons());
    call.relu = true, call.y = rectified.data();
    kernels.linear_forward(call);
    bool same = rectified.strip_is_whole();
    for (int64_t i = 0; i < s.rows * s.neurons(); ++i) same = same && rectified[i] == std::max(y[i], 0.0f);
    report(same, kernels.name, "ReLU", where);
  }
  report(packed_light.strip_is_whole() && packed_weight.strip_is_whole(), kernels.name, "packed past the end", c.describe());
}

// The gradients of a layer whose output has the gradient grad_y.
struct Gradients {
  vector<double> full, light, x, weight, logits;

  Gradients(const Layer& layer, const Tensor& grad_y)
      : full(layer.light.size()), light(layer.light.size()), x(std::size_t(layer.s.rows * layer.s.depth)),
        weight(std::size_t(layer.s.neurons() * layer.s.depth)), logits(layer.selected.size()) {
    const Shape& s = layer.s;
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t j = 0; j < s.neurons(); ++j) {
        const std::size_t at = std::size_t(r * s.neurons() + j);
        const int64_t group = j / s.group_size, block = r / s.span;
        const double a = layer.weight_of(r, group), g = grad_y[int64_t(at)];
        full[at] = g * a, light[at] = g * (1 - a);
        for (int64_t i = 0; i < s.depth; ++i) {
          x[std::size_t(r * s.depth + i)] += g * a * layer.weight[j * s.depth + i];
          weight[std::size_t(j * s.depth + i)] += g * a * layer.x[r * s.depth + i];
        }
        if (!layer.chosen(block, group)) continue;
        const auto begin = layer.selected.begin() + block * s.k;
        const double slope = layer.gate(block, group) * (1 - layer.gate(block, group));
        logits[std::size_t(block * s.k + (std::find(begin, begin + s.k, std::int32_t(group)) - begin))] +=
            g * (layer.full[at] - layer.light[at]) * slope;
      }
  }
};

// What the backward kernels take from the forward pass, and where they write.
struct BackwardTensors {
  Tensor code, light_up, gate, grad_light, grad_x, grad_logits, grad_weight;

  BackwardTensors(const Layer& layer, Storage storage, int64_t inputs)
      : code(Storage::float32, layer.s.rows * layer.s.rank), light_up(Storage::float32, layer.s.neurons() * layer.s.rank),
        gate(Storage::float32, layer.s.blocks() * layer.s.k), grad_light(storage, layer.s.rows * layer.s.neurons()),
        grad_x(Storage::float32, inputs), grad_logits(Storage::float32, gate.count),
        grad_weight(Storage::float32, layer.s.neurons() * layer.s.depth) {
    for (int64_t i = 0; i < light_up.count; ++i) light_up.set(i, layer.light_up[i]);
    for (int64_t i = 0; i < code.count; ++i) code.set(i, float(layer.code[std::size_t(i)]));
    for (int64_t i = 0; i < gate.count; ++i)
      if (layer.selected[std::size_t(i)] >= 0) gate.set(i, float(layer.gate(i / layer.s.k, layer.selected[std::size_t(i)])));
  }
  void compare_with(const Kernels& kernels, const Layer& layer, const Gradients& expected, Storage storage,
                    const std::string& where) {
    for (int64_t i = 0; i < grad_logits.count; ++i)
      if (layer.selected[std::size_t(i)] < 0) grad_logits.set(i, 0);
    const double limit = kBackwardLimit[int(storage)];
    compare(kernels, grad_light, expected.light, limit, "gradient of the light path", where);
    compare(kernels, grad_x, expected.x, limit, "gradient of x", where);
    compare(kernels, grad_logits, expected.logits, limit, "gradient of the logits", where);
    compare(kernels, grad_weight, expected.weight, limit, "gradient of weight", where);
  }
};

void test_backward(const Kernels& kernels, const Case& c) {
  Layer layer(c);
  const Shape& s = c.shape;
  Tensor grad_y = Tensor::random(c.storage, s.rows * s.neurons());
  BackwardTensors t(layer, c.storage, s.rows * s.depth);
  kernels.linear_backward({
      .storage = c.storage, .grad_y = grad_y.data(), .x = layer.x.data(), .x_stride = s.depth, .rows = s.rows, .depth = s.depth,
      .neurons = s.neurons(), .rank = s.rank, .groups = s.groups, .selected_groups = s.k, .positions = s.rows, .span = s.span,
      .weight = layer.weight.data(), .code = t.code.as<float>(), .light_up = t.light_up.as<float>(),
      .selected = layer.selected.data(), .gate = t.gate.as<float>(), .hard = c.hard,
      .grad_light = t.grad_light.data(), .grad_x = t.grad_x.as<float>(), .grad_logits = t.grad_logits.as<float>(),
      .grad_weight = t.grad_weight.as<float>(), .threads = 1});
  t.compare_with(kernels, layer, Gradients(layer, grad_y), c.storage, c.describe());
}

// What lies between dense products; rows of the full path's gradient and of the difference lie apart.
void test_split(const Kernels& kernels, const Case& c) {
  const std::uint64_t before = state;  // the other tests keep their numbers
  Layer layer(c);
  const Shape& s = c.shape;
  const int64_t n = s.neurons(), stride = n + 5;
  Tensor grad_y = Tensor::random(c.storage, s.rows * n), difference(c.storage, s.rows * stride);
  for (int64_t i = 0; i < s.rows * n; ++i)
    difference.set(i / n * stride + i % n, float(layer.full[std::size_t(i)] - layer.light[std::size_t(i)]));
  const Gradients expected(layer, grad_y);
  BackwardTensors t(layer, c.storage, s.rows * s.depth);
  Tensor full(c.storage, s.rows * stride), light(c.storage, s.rows * n);
  kernels.split_gradient({
      .storage = c.storage, .grad_y = grad_y.data(), .difference = difference.data(),
      .difference_stride = stride, .rows = s.rows, .neurons = n, .groups = s.groups, .selected_groups = s.k,
      .positions = s.rows, .span = s.span, .selected = layer.selected.data(), .gate = t.gate.as<float>(), .hard = c.hard,
      .grad_full = full.data(), .grad_full_stride = stride, .grad_light = light.data(),
      .grad_logits = t.grad_logits.as<float>(), .threads = 1});
  Tensor dense(c.storage, s.rows * n);
  bool between = true;  // nobody wrote there
  for (int64_t i = 0; i < s.rows * stride; ++i) {
    if (i % stride < n)
      dense.set(i / stride * n + i % stride, full[i]);
    else
      between = between && std::isnan(full[i]);
  }
  const double limit = kBackwardLimit[int(c.storage)];
  compare(kernels, dense, expected.full, limit, "split gradient of the full path", c.describe());
  compare(kernels, light, expected.light, limit, "split gradient of the light path", c.describe());
  report(between && full.strip_is_whole(), kernels.name, "split wrote between rows", c.describe());
  for (int64_t i = 0; i < t.grad_logits.count; ++i)
    if (layer.selected[std::size_t(i)] < 0) t.grad_logits.set(i, 0);
  compare(kernels, t.grad_logits, expected.logits, limit, "split gradient of the logits", c.describe());
  state = before;
}

// A product and its gradients; rows of x lie `gap` elements apart.
void test_projection(const Kernels& kernels, Storage storage, int64_t rows, int64_t depth, int64_t neurons, int64_t gap) {
  const int64_t stride = depth + gap;
  Tensor x = Tensor::random(storage, rows * stride), weight = Tensor::random(storage, neurons * depth);
  Tensor grad_y = Tensor::random(storage, rows * neurons), before = Tensor::random(rows * depth);
  vector<double> y(std::size_t(rows * neurons)), grad_x(std::size_t(rows * depth)), grad_weight(std::size_t(neurons * depth));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < neurons; ++j)
      for (int64_t i = 0; i < depth; ++i) {
        const double a = x[r * stride + i], w = weight[j * depth + i], g = grad_y[r * neurons + j];
        y[std::size_t(r * neurons + j)] += a * w;
        grad_x[std::size_t(r * depth + i)] += g * w;
        grad_weight[std::size_t(j * depth + i)] += g * a;
      }
  const std::string where = std::to_string(rows) + " rows, " + std::to_string(depth) + " deep, " + std::to_string(neurons) + " neurons";
  Tensor out(Storage::float32, rows * neurons);
  kernels.projection({.storage = storage, .x = x.data(), .x_stride = stride, .rows = rows, .depth = depth, .neurons = neurons,
                      .weight = weight.data(), .y = out.as<float>(), .threads = 1});
  compare(kernels, out, y, kForwardLimit[0], "projection", where);
  for (const bool accumulate : {false, true}) {
    Tensor input(Storage::float32, rows * depth), filters(Storage::float32, neurons * depth);
    if (accumulate) input = before;
    kernels.projection_backward({.storage = storage, .grad_y = grad_y.data(), .x = x.data(), .x_stride = stride, .rows = rows,
                                 .depth = depth, .neurons = neurons, .weight = weight.data(), .grad_x = input.as<float>(),
                                 .accumulate = accumulate, .grad_weight = filters.as<float>(), .threads = 1});
    for (int64_t i = 0; accumulate && i < rows * depth; ++i) grad_x[std::size_t(i)] += before[i];
    compare(kernels, input, grad_x, kBackwardLimit[0], "gradient of a projection's x", where);
    compare(kernels, filters, grad_weight, kBackwardLimit[0], "gradient of a projection's weight", where);
  }
}

// One image, its patches as the rows of a layer.
// One image, and the windows that a convolution looks at: `c` gets their number and size.
struct Windows {
  static constexpr int64_t kHeight = 7, kWidth = 6;
  midl::Images m{};
  Tensor image;
  vector<int64_t> from;  // (rows, depth): where in the image, -1 for padding

  Windows(Storage storage, bool channels_last, int64_t channels, int64_t kernel, int64_t stride, int64_t dilation, Case& c)
      : image(Tensor::random(storage, channels * kHeight * kWidth)) {
    const int64_t padding = dilation * (kernel / 2);
    const auto out = [&](int64_t size) { return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; };
    m.channels = channels, m.height = kHeight, m.width = kWidth;
    m.channel_stride = channels_last ? 1 : kHeight * kWidth, m.column_stride = channels_last ? channels : 1;
    m.row_stride = kWidth * m.column_stride, m.batch_stride = channels * kHeight * kWidth;
    m.kernel_height = m.kernel_width = kernel, m.stride_y = m.stride_x = stride;
    m.padding_y = m.padding_x = padding, m.dilation_y = m.dilation_x = dilation;
    m.out_height = out(kHeight), m.out_width = out(kWidth);
    c.shape.rows = m.out_height * m.out_width, c.shape.depth = kernel * kernel * channels;
    if (c.shape.span == 0) c.shape.span = c.shape.rows;
    for (int64_t i = 0; i < c.shape.rows * c.shape.depth; ++i) {
      const int64_t pixel = i / c.shape.depth, at = i % c.shape.depth, tap = at / channels;
      const int64_t y = pixel / m.out_width * stride + tap / kernel * dilation - padding;
      const int64_t x = pixel % m.out_width * stride + tap % kernel * dilation - padding;
      const bool inside = y >= 0 && y < kHeight && x >= 0 && x < kWidth;
      from.push_back(inside ? y * m.row_stride + x * m.column_stride + at % channels * m.channel_stride : -1);
    }
  }
  Tensor patches() const {
    Tensor out(Storage::float32, int64_t(from.size()));
    for (int64_t i = 0; i < out.count; ++i) out.set(i, from[std::size_t(i)] < 0 ? 0 : image[from[std::size_t(i)]]);
    return out;
  }
};

void test_convolution(const Kernels& kernels, Storage storage, bool channels_last, int64_t channels, int64_t kernel,
                      int64_t stride, int64_t dilation, Case c) {
  Windows windows(storage, channels_last, channels, kernel, stride, dilation, c);
  const midl::Images& m = windows.m;
  c.storage = kernels.dot_pairs ? storage : Storage::float32;  // of the parameters
  const Shape& s = c.shape;
  Layer layer(c, windows.patches());
  midl::LinearPack parameters{
      .storage = c.storage, .depth = s.depth, .neurons = s.neurons(), .rank = s.rank, .groups = s.groups,
      .weight = layer.weight.data(), .light_down = layer.light_down.data(), .light_up = layer.light_up.data(),
      .gate_weight = c.light_gate ? nullptr : layer.gate_weight.data(), .packed_light = nullptr,
      .packed_weight = nullptr, .threads = 1};
  const midl::PackedSizes sizes = kernels.packed_sizes(parameters);
  const bool panels = kernels.wants_weight_panels(c.storage, s.rows, s.depth, s.groups, s.k, s.group_size, true);
  Tensor packed_light(c.storage, sizes.light), packed_weight(c.storage, sizes.weight);
  parameters.packed_light = packed_light.data();
  if (panels) parameters.packed_weight = packed_weight.data();
  kernels.pack(parameters);
  Tensor y(storage, s.rows * s.neurons());
  vector<std::int32_t> selected(std::size_t(s.blocks() * s.k), -2);
  kernels.convolution_forward(
      {.storage = storage,
       .images = m,
       .rows = {
           .storage = c.storage, .x = windows.image.data(), .x_stride = 0, .rows = s.rows, .depth = s.depth,
           .neurons = s.neurons(), .rank = s.rank, .groups = s.groups, .selected_groups = s.k,
           .threshold = c.threshold, .positions = s.span > 1 ? s.rows : m.out_width, .span = s.span, .weight = layer.weight.data(),
           .bias = layer.bias.data(), .light_down = nullptr, .light_up = layer.light_up.data(),
           .gate_weight = parameters.gate_weight, .gate_bias = c.light_gate ? nullptr : layer.gate_bias.data(),
           .noise = nullptr, .packed_light = packed_light.data(),
           .packed_weight = panels ? packed_weight.data() : nullptr, .full = nullptr, .hard = c.hard, .y = y.data(),
           .selected = selected.data(), .threads = 1}});
  const std::string where = c.describe() + ", convolution of " + std::to_string(channels) + " channels";
  if (report(selected == layer.selected, kernels.name, "selection", where))
    compare(kernels, y, layer.y, kForwardLimit[int(storage)], "output", where);
}

// The selected neurons' gradients, and those of one plain convolution, which are added to them.
void test_convolution_backward(const Kernels& kernels, bool channels_last, int64_t channels, int64_t kernel, int64_t stride,
                               int64_t dilation, Case c) {
  Windows windows(c.storage, channels_last, channels, kernel, stride, dilation, c);
  const midl::Images& m = windows.m;
  const Shape& s = c.shape;
  Layer layer(c, windows.patches());
  Tensor grad_y = Tensor::random(c.storage, s.rows * s.neurons());
  // grad_x is channels last whatever x is.
  const int64_t pixels = m.height * m.width;
  const auto to_pixels = [&](const vector<double>& of_windows) {
    vector<double> sums(std::size_t(pixels * channels));
    for (std::size_t i = 0; i < of_windows.size(); ++i) {
      const int64_t at = windows.from[i];
      if (at >= 0) sums[std::size_t(channels_last ? at : at % pixels * channels + at / pixels)] += of_windows[i];
    }
    return sums;
  };
  Gradients expected(layer, grad_y);
  expected.x = to_pixels(expected.x);
  BackwardTensors t(layer, c.storage, pixels * channels);
  const std::string where = c.describe() + ", convolution of " + std::to_string(channels) + " channels";
  midl::ConvolutionBackward call{
      .storage = c.storage, .images = m, .x = windows.image.data(), .grad_y = grad_y.data(), .rows = s.rows,
      .neurons = s.neurons(), .rank = s.rank, .groups = s.groups, .selected_groups = s.k,
      .positions = s.span > 1 ? s.rows : m.out_width, .span = s.span, .weight = layer.weight.data(),
      .selected = layer.selected.data(), .gate = t.gate.as<float>(), .code = t.code.as<float>(),
      .light_up = t.light_up.as<float>(), .hard = c.hard, .grad_light = t.grad_light.data(), .grad_x = t.grad_x.as<float>(),
      .accumulate = false, .grad_logits = t.grad_logits.as<float>(), .grad_weight = t.grad_weight.as<float>(), .threads = 1};
  kernels.convolution_backward(call);
  t.compare_with(kernels, layer, expected, c.storage, where);

  Case one = c;  // as light_down: every row wants every neuron
  one.shape.groups = 1, one.shape.group_size = s.rank, one.shape.k = 1, one.hard = true, one.threshold = kNone;
  Layer plain(one, windows.patches());
  Tensor grad_code = Tensor::random(c.storage, s.rows * s.rank), grad_down(Storage::float32, s.rank * s.depth);
  Gradients added(plain, grad_code);
  const vector<double> grad_x = to_pixels(added.x);
  for (std::size_t i = 0; i < grad_x.size(); ++i) expected.x[i] += grad_x[i];
  call.grad_y = grad_code.data(), call.weight = plain.weight.data(), call.grad_weight = grad_down.as<float>();
  call.neurons = s.rank, call.groups = call.selected_groups = 1, call.positions = call.span = 1;
  call.selected = nullptr, call.gate = call.code = call.light_up = nullptr, call.grad_light = nullptr;
  call.hard = call.accumulate = true, call.grad_logits = nullptr;
  kernels.convolution_backward(call);
  compare(kernels, t.grad_x, expected.x, kBackwardLimit[int(c.storage)], "gradients of x together", where);
  compare(kernels, grad_down, added.weight, kBackwardLimit[int(c.storage)], "gradient of light_down", where);
}

struct FfnCase {
  int64_t rows, depth, groups, group_size, outputs, rank, k;
  bool gated, hard;
  float threshold;
  Storage storage = Storage::float32;
};

// relu(x . weight + bias) [* (x . value)] of the selected groups, less a light value, times down, and the light path; with
// and without panels, whose results have the same bits.
void test_ffn(const Kernels& kernels, const FfnCase& c, int threads) {
  const int64_t hidden = c.groups * c.group_size;
  const auto matrix = [&](int64_t rows, int64_t depth) { return Tensor::random(c.storage, rows * depth, Layer::scale(depth)); };
  const auto vector_of = [&](int64_t size) { return Tensor::random(c.storage, size, 1.0f); };
  Tensor x = vector_of(c.rows * c.depth), weight = matrix(hidden, c.depth), bias = vector_of(hidden);
  Tensor value = matrix(hidden, c.depth), down = matrix(c.outputs, hidden), down_bias = vector_of(c.outputs);
  Tensor light_down = matrix(c.rank, c.depth), light_up = matrix(c.outputs, c.rank), light = vector_of(hidden);
  Tensor light_bias = vector_of(c.outputs), gate_weight = matrix(c.groups, c.rank), gate_bias = vector_of(c.groups);
  Tensor noise = Tensor::random(c.rows * c.groups);
  const vector<double> code = Layer::product(x, light_down, c.rows, c.rank, c.depth);
  const vector<double> before = Layer::product(x, weight, c.rows, hidden, c.depth);
  const vector<double> values = Layer::product(x, value, c.rows, hidden, c.depth);
  vector<double> expected(std::size_t(c.rows * c.outputs));
  vector<std::int32_t> chosen;
  for (int64_t r = 0; r < c.rows; ++r) {
    vector<double> logits, scores;
    for (int64_t g = 0; g < c.groups; ++g) {
      double logit = gate_bias[g];
      for (int64_t i = 0; i < c.rank; ++i) logit += code[std::size_t(r * c.rank + i)] * gate_weight[g * c.rank + i];
      logits.push_back(logit);
      scores.push_back(logit + noise[r * c.groups + g]);
    }
    const auto row = top(scores, c.k, c.threshold);
    chosen.insert(chosen.end(), row.begin(), row.end());
    double light_share = 1;
    vector<double> mixed(std::size_t(hidden), 0.0);
    for (const std::int32_t g : row) {
      if (g < 0) continue;
      const double share = c.hard ? 1 : 1 / (1 + std::exp(-logits[std::size_t(g)]));
      light_share -= share / double(c.groups);
      for (int64_t u = g * c.group_size; u < (g + 1) * c.group_size; ++u) {
        const double h = std::max(before[std::size_t(r * hidden + u)] + bias[u], 0.0);
        mixed[std::size_t(u)] = share * (h * (c.gated ? values[std::size_t(r * hidden + u)] : 1) - light[u]);
      }
    }
    for (int64_t o = 0; o < c.outputs; ++o) {
      double y = light_bias[o] + down_bias[o];
      for (int64_t i = 0; i < c.rank; ++i) y += light_share * code[std::size_t(r * c.rank + i)] * light_up[o * c.rank + i];
      for (int64_t u = 0; u < hidden; ++u) y += mixed[std::size_t(u)] * down[o * hidden + u];
      expected[std::size_t(r * c.outputs + o)] = y;
    }
  }
  const midl::FfnPack sizes{.storage = c.storage, .depth = c.depth, .hidden = hidden, .outputs = c.outputs, .rank = c.rank, .groups = c.groups,
                            .weight = weight.data(), .value_weight = c.gated ? value.data() : nullptr,
                            .down_weight = down.data(), .light_down = light_down.data(),
                            .light_up = light_up.data(), .gate_weight = gate_weight.data(), .panels = nullptr,
                            .threads = 1};
  Tensor panels(c.storage, kernels.packed_ffn_size(sizes));
  midl::FfnPack packing = sizes;
  packing.panels = panels.data();
  kernels.pack_ffn(packing);
  const std::string where = std::to_string(c.rows) + " rows, " + std::to_string(c.groups) + " groups of " +
                            std::to_string(c.group_size) + ", " + std::to_string(threads) + " threads";
  report(panels.strip_is_whole(), kernels.name, "pack_ffn wrote past the end", where);
  Tensor first(c.storage, 0);
  for (const bool packed : {false, true}) {
    Tensor y(c.storage, c.rows * c.outputs);
    vector<std::int32_t> selected(std::size_t(c.rows * c.k), -2);
    kernels.ffn_forward({.storage = c.storage, .x = x.data(), .x_stride = c.depth, .rows = c.rows, .depth = c.depth, .hidden = hidden,
                         .outputs = c.outputs, .rank = c.rank, .groups = c.groups, .selected_groups = c.k,
                         .threshold = c.threshold, .weight = weight.data(), .bias = bias.data(),
                         .value_weight = sizes.value_weight, .value_bias = nullptr, .down_weight = down.data(),
                         .down_bias = down_bias.data(), .light_down = light_down.data(),
                         .light_up = light_up.data(), .light_hidden = light.data(),
                         .light_bias = light_bias.data(), .gate_weight = gate_weight.data(),
                         .gate_bias = gate_bias.data(), .noise = noise.as<float>(),
                         .panels = packed ? panels.data() : nullptr, .hard = c.hard,
                         .activation = midl::Activation::relu, .y = y.data(), .selected = selected.data(),
                         .threads = threads});
    compare(kernels, y, expected, kForwardLimit[int(c.storage)], packed ? "ffn on panels" : "ffn", where);
    report(selected == chosen, kernels.name, "selection of the ffn", where);
    if (packed) report(y.halves == first.halves, kernels.name, "ffn on panels has other bits", where);
    first = y;
  }
}

// Gradients through the selected hidden units, ReLU, against plain loops.
void test_ffn_backward(const Kernels& kernels, const FfnCase& c, int threads) {
  const int64_t hidden = c.groups * c.group_size;
  const auto matrix = [](int64_t rows, int64_t depth) { return Tensor::random(Storage::float32, rows * depth, Layer::scale(depth)); };
  Tensor x = Tensor::random(c.rows * c.depth), weight = matrix(hidden, c.depth), bias = Tensor::random(hidden);
  Tensor value = matrix(hidden, c.depth), down = matrix(c.outputs, hidden), light = Tensor::random(hidden);
  Tensor grad_y = Tensor::random(c.rows * c.outputs), gate = Tensor::random(c.rows * c.k);
  vector<std::int32_t> selected(std::size_t(c.rows * c.k));
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.k; ++i)  // the last slot of every third row stays empty
      selected[std::size_t(r * c.k + i)] = i > 0 && i + 1 == c.k && r % 3 == 2 ? -1 : std::int32_t((r + i) % c.groups);
  const vector<double> before = Layer::product(x, weight, c.rows, hidden, c.depth);
  const vector<double> values = Layer::product(x, value, c.rows, hidden, c.depth);
  const auto zeros = [](int64_t n) { return vector<double>(std::size_t(n), 0.0); };
  auto expected_x = zeros(c.rows * c.depth), expected_weight = zeros(hidden * c.depth), expected_value = zeros(hidden * c.depth);
  auto expected_down = zeros(hidden * c.outputs), expected_bias = zeros(hidden), expected_light = zeros(hidden);
  auto expected_logits = zeros(c.rows * c.k);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.k; ++i) {
      const std::int32_t g = selected[std::size_t(r * c.k + i)];
      const double share = c.hard ? 1 : gate[r * c.k + i];
      for (int64_t u = g * c.group_size; g >= 0 && u < (g + 1) * c.group_size; ++u) {
        double grad = 0;
        for (int64_t o = 0; o < c.outputs; ++o) grad += double(grad_y[r * c.outputs + o]) * down[o * hidden + u];
        const double b = before[std::size_t(r * hidden + u)] + bias[u], a = std::max(b, 0.0);
        const double v = c.gated ? values[std::size_t(r * hidden + u)] : 1, difference = a * v - light[u];
        expected_logits[std::size_t(r * c.k + i)] += grad * difference;
        const double inner = b > 0 ? share * grad * v : 0, other = share * grad * a;
        expected_bias[std::size_t(u)] += inner;
        expected_light[std::size_t(u)] -= share * grad;
        for (int64_t j = 0; j < c.depth; ++j) {
          expected_x[std::size_t(r * c.depth + j)] += inner * weight[u * c.depth + j] + (c.gated ? other * value[u * c.depth + j] : 0);
          expected_weight[std::size_t(u * c.depth + j)] += inner * x[r * c.depth + j];
          expected_value[std::size_t(u * c.depth + j)] += other * x[r * c.depth + j];
        }
        for (int64_t o = 0; o < c.outputs; ++o)
          expected_down[std::size_t(u * c.outputs + o)] += share * difference * grad_y[r * c.outputs + o];
      }
    }
  const auto empty = [](int64_t n) { return Tensor(Storage::float32, n); };
  Tensor grad_x = empty(c.rows * c.depth), grad_x_of_value = empty(c.rows * c.depth), grad_weight = empty(hidden * c.depth);
  Tensor grad_value = empty(hidden * c.depth), grad_down = empty(hidden * c.outputs), grad_bias = empty(hidden);
  Tensor grad_value_bias = empty(hidden), grad_light = empty(hidden), grad_logits = Tensor::random(c.rows * c.k);
  kernels.ffn_backward({.grad_y = grad_y.as<float>(), .x = x.as<float>(), .x_stride = c.depth, .rows = c.rows, .depth = c.depth,
                        .hidden = hidden, .outputs = c.outputs, .groups = c.groups, .selected_groups = c.k,
                        .weight = weight.as<float>(), .bias = bias.as<float>(), .value_weight = c.gated ? value.as<float>() : nullptr,
                        .value_bias = nullptr, .down_weight = down.as<float>(), .light_hidden = light.as<float>(),
                        .selected = selected.data(), .gate = gate.as<float>(), .hard = c.hard, .activation = midl::Activation::relu,
                        .grad_x = grad_x.as<float>(), .grad_x_of_value = c.gated ? grad_x_of_value.as<float>() : nullptr,
                        .grad_weight = grad_weight.as<float>(), .grad_value_weight = c.gated ? grad_value.as<float>() : nullptr,
                        .grad_down = grad_down.as<float>(), .grad_bias = grad_bias.as<float>(),
                        .grad_value_bias = c.gated ? grad_value_bias.as<float>() : nullptr,
                        .grad_light_hidden = grad_light.as<float>(), .grad_logits = grad_logits.as<float>(), .threads = threads});
  for (int64_t i = 0; c.gated && i < c.rows * c.depth; ++i) grad_x.set(i, grad_x[i] + grad_x_of_value[i]);
  for (int64_t i = 0; i < c.rows * c.k; ++i)
    if (selected[std::size_t(i)] < 0) grad_logits.set(i, 0);
  const std::string where = std::to_string(c.rows) + " rows, " + std::to_string(c.groups) + " groups of " +
                            std::to_string(c.group_size) + ", " + std::to_string(threads) + " threads";
  const double limit = kBackwardLimit[0];
  compare(kernels, grad_x, expected_x, limit, "ffn grad_x", where);
  compare(kernels, grad_weight, expected_weight, limit, "ffn grad_weight", where);
  if (c.gated) compare(kernels, grad_value, expected_value, limit, "ffn grad_value_weight", where);
  compare(kernels, grad_down, expected_down, limit, "ffn grad_down", where);
  compare(kernels, grad_bias, expected_bias, limit, "ffn grad_bias", where);
  compare(kernels, grad_light, expected_light, limit, "ffn grad_light_hidden", where);
  compare(kernels, grad_logits, expected_logits, limit, "ffn grad_logits", where);
}

void test(const Kernels& kernels) {
  const Shape shapes[] = {
      // rows depth groups x size rank k span
      {1, 1, 1, 1, 1, 1, 1},       {1, 1, 3, 32, 1, 2, 1},     {3, 17, 17, 1, 5, 8, 1},     {1, 100, 40, 1, 7, 18, 1},
      {13, 40, 6, 2, 7, 3, 1},     {13, 41, 60, 5, 7, 27, 1},  {9, 63, 7, 9, 6, 3, 1},      {17, 100, 6, 16, 31, 3, 1},
      {13, 43, 9, 4, 7, 4, 1},     {29, 1037, 9, 8, 7, 4, 1},  {8, 50, 11, 6, 3, 5, 2},
      {1, 1030, 5, 16, 9, 2, 1},   {2, 1027, 3, 32, 8, 2, 1},  {37, 130, 5, 32, 33, 2, 1},  {8, 65, 3, 48, 4, 2, 1},
      {5, 33, 2, 100, 6, 1, 1},    {11, 20, 6, 8, 4, 2, 3},    {40, 24, 3, 40, 4, 3, 7},    {61, 19, 33, 3, 3, 1, 1},
      {7, 2050, 2, 64, 3, 1, 1},
      // Panels that end with a folded sub-panel, behind another or alone; the gate's in passes over a deep code.
      {30, 1030, 3, 20, 41, 2, 1}, {9, 1050, 21, 24, 6, 9, 1}, {5, 31, 4, 12, 12, 2, 1},
      {6, 40, 3, 16, 1100, 2, 1},  {26, 21, 39, 32, 1030, 20, 1},
  };
  state = 1;  // the same numbers for every instruction set, whatever ran before
  test_topk(kernels);
  int turn = 0;
  const auto test_layer = [&](const Shape& shape) {
    for (const Storage storage : {Storage::float32, Storage::bfloat16})
      for (const bool light_gate : {false, true}) {
        Case c{shape, storage, light_gate, ++turn % 3 == 0, kNone};
        for (const float threshold : {kNone, 0.4f}) {
          c.threshold = threshold;
          test_forward(kernels, c);
          if (storage == Storage::float32) test_backward(kernels, c);
          test_split(kernels, c);
        }
      }
  };
  for (const Shape& shape : shapes) test_layer(shape);
  for (const Storage storage : {Storage::float32, Storage::bfloat16})
    for (const bool channels_last : {true, false})
      for (const int64_t channels : {3, 16, 37})
        for (const int64_t stride : {1, 2}) {
          const Case c{{0, 0, 5, channels == 16 ? 3 : 32, 6, 2, stride == 1 ? 1 : 0}, Storage::float32, channels_last, false,
                       channels == 37 ? 0.4f : kNone};
          test_convolution(kernels, storage, channels_last, channels, 3, stride, 3 - stride, c);
          for (const int64_t size : {2, 4, 8})
            test_convolution(kernels, storage, channels_last, channels, 3, stride, 3 - stride,
                             {{0, 0, 7, size, 3, 3, 1}, Storage::float32, false, true, kNone});
          // Passes that end within a folded word.
          test_convolution(kernels, storage, channels_last, 34, 5, stride, 3 - stride,
                           {{0, 0, 2, 16, 4, 1, 1}, Storage::float32, false, true, kNone});
          test_convolution(kernels, storage, channels_last, 34, 5, stride, 3 - stride,
                           {{0, 0, 2, 24, 20, 1, 1}, Storage::float32, false, true, kNone});
          if (channels == 16)
            test_convolution(kernels, storage, channels_last, 50, 3, stride, 3 - stride,
                             {{0, 0, 3, 16, 5, 1, 1}, Storage::float32, true, true, kNone});
        }
  for (const Storage storage : {Storage::float32, Storage::bfloat16})
    for (const bool channels_last : {true, false})
      for (const int64_t channels : {3, 16, 37})
        for (const int64_t stride : {1, 2}) {
          if (storage == Storage::bfloat16 && !kernels.dot_pairs) continue;
          for (const int64_t size : {2, 16, 33})
            test_convolution_backward(kernels, channels_last, channels, 3, stride, 3 - stride,
                                      {{0, 0, 5, size, 6, 3, size == 16 ? 0 : 1}, storage, size == 2, size == 33, channels == 37 ? 0.4f : kNone});
        }
  if (kernels.dot_pairs)
    for (const Shape& shape : shapes)
      for (const bool light_gate : {false, true})
        for (const float threshold : {kNone, 0.4f})
          test_backward(kernels, {shape, Storage::bfloat16, light_gate, ++turn % 3 == 0, threshold});
  for (const Storage storage : {Storage::float32, Storage::bfloat16}) {
    if (storage == Storage::bfloat16 && !kernels.dot_pairs) continue;
    test_projection(kernels, storage, 1, 1, 1, 0);
    test_projection(kernels, storage, 13, 40, 5, 0);
    test_projection(kernels, storage, 37, 17, 63, 3);
    test_projection(kernels, storage, 70, 130, 33, 1);
    test_projection(kernels, storage, 9, 75, 1050, 2);
    test_projection(kernels, storage, 1100, 21, 7, 0);
  }
  const FfnCase ffns[] = {
      {1, 5, 4, 3, 7, 3, 2, false, false, kNone},        {13, 40, 6, 16, 33, 9, 3, false, true, 0.3f},
      {9, 17, 3, 40, 100, 5, 2, false, false, 0.1f},     {15, 1030, 2, 100, 20, 33, 1, false, true, kNone},
      {37, 33, 5, 1, 64, 7, 4, false, false, kNone},     {140, 201, 45, 1, 64, 7, 15, false, true, kNone},
      {70, 40, 12, 3, 33, 7, 4, false, false, 0.3f},
  };
  const auto test_ffns = [&](bool gated, Storage storage) {
    for (const int threads : {1, 3})
      for (FfnCase c : ffns) {
        c.gated = gated, c.storage = storage;
        test_ffn(kernels, c, threads);
      }
  };
  // Work for several threads: few rows, more, and rows enough that each has its own.
  const auto test_large_ffns = [&](bool gated, Storage storage) {
    test_ffn(kernels, {2, 300, 20, 32, 200, 70, 9, gated, false, kNone, storage}, 3);
    test_ffn(kernels, {70, 130, 11, 24, 130, 40, 5, gated, true, kNone, storage}, 2);
    test_ffn(kernels, {270, 70, 9, 20, 65, 20, 4, gated, false, kNone, storage}, 2);
  };
  for (const bool gated : {false, true}) {
    test_ffns(gated, Storage::float32);
    for (const int threads : {1, 3}) {
      test_ffn_backward(kernels, {9, 17, 3, 40, 101, 5, 2, gated, false, kNone}, threads);
      test_ffn_backward(kernels, {37, 33, 6, 8, 20, 5, 3, gated, true, kNone}, threads);
    }
    test_ffn_backward(kernels, {540, 70, 9, 20, 65, 5, 4, gated, false, kNone}, 2);
    test_large_ffns(gated, Storage::float32);
  }
  // Neurons picked by many rows: several passes of the depth and of the rows, a last vector that is not whole.
  const Shape picked[] = {
      {150, 403, 40, 1, 7, 17, 1}, {33, 21, 70, 1, 3, 20, 1}, {60, 193, 23, 3, 5, 8, 2}, {70, 16, 9, 4, 4, 2, 1},
      {530, 33, 41, 2, 3, 9, 7},
  };
  for (const Shape& shape : picked) test_layer(shape);
  for (const bool gated : {false, true}) {
    test_ffns(gated, Storage::bfloat16);
    test_large_ffns(gated, Storage::bfloat16);
    // Parts of an odd number of units, one and several rows to a group.
    test_ffn(kernels, {1, 33, 5, 35, 70, 3, 3, gated, false, kNone, Storage::bfloat16}, 1);
    test_ffn(kernels, {41, 33, 5, 35, 70, 3, 3, gated, false, kNone, Storage::bfloat16}, 2);
  }
}

}  // namespace

int main(int count, char** names) {
  for (const midl::Variant& variant : midl::variants()) {
    const bool named = std::any_of(names + 1, names + count, [&](const char* n) { return n == std::string(variant.kernels->name); });
    if (count > 1 && !named) continue;
    if (!variant.supported) {
      std::printf("%s: not on this processor\n", variant.kernels->name);
      failures += named;
      continue;
    }
    const int before = failures, checked = checks;
    test(*variant.kernels);
    std::printf("%s: %d checks, %d failed\n", variant.kernels->name, checks - checked, failures - before);
  }
  std::printf("in use: %s\n", midl::current().name);
  return failures ? 1 : 0;
}
