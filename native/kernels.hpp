// The calls that every instruction set implements: plain pointers and sizes in, nothing allocated that outlives a call.
#pragma once

#include <cstdint>

namespace midl {

enum class Storage : int { float32 = 0, bfloat16 = 1 };

// One layer call. Matrices are row-major and dense unless a stride is given; see src/midl/ops/__init__.py for the names.
struct LinearForward {
  Storage storage;             // of x, y and all parameters
  const void* x;               // (rows, depth)
  std::int64_t x_stride;       // elements from row to row
  std::int64_t rows, depth, neurons, rank, groups;
  std::int64_t selected_groups;  // by a block; with `threshold`, at most
  float threshold = -__builtin_inff();  // logit that all but a block's first group must reach
  std::int64_t positions;      // rows of a sequence; `rows` is a multiple
  std::int64_t span;           // neighbouring rows of a sequence that share a selection
  const void* weight;          // (neurons, depth)
  const void* bias;            // (neurons) or null
  const void* light_down;      // (rank, depth)
  const void* light_up;        // (neurons, rank)
  const void* gate_weight;     // (groups, rank), or null for the light gate
  const void* gate_bias;       // (groups), null with gate_weight
  const float* noise;          // (blocks, groups) or null
  const void* packed_light;    // what `pack` made of these parameters, or null
  const void* packed_weight;
  const void* full = nullptr;  // (rows, neurons) like y, the full path of every neuron where the caller has computed it, or null
  bool hard;                   // interpolation weight 1 instead of sigmoid
  bool relu = false;           // y is what a ReLU makes of the output
  void* y;                     // (rows, neurons)
  std::int32_t* selected;      // (blocks, selected_groups), -1 behind the selected; or null where nobody wants it
  int threads;
};

// Images and the window of a convolution that runs over them; strides in elements.
struct Images {
  std::int64_t channels, height, width;
  std::int64_t batch_stride, channel_stride, row_stride, column_stride;
  std::int64_t kernel_height, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  std::int64_t out_height, out_width;
};

// The layer whose rows are the output pixels of images: `rows.x` is the first image, `rows.depth` the size of the
// receptive field, in the order kernel row, kernel column, channel. Parameters are float32, for bfloat16 images bfloat16
// where the kernels say dot_pairs; those of the light path come packed, `light_up` plain as well, and those of the full
// path packed too where wants_weight_panels says so.
struct ConvolutionForward {
  Storage storage;             // of the images, in and out
  Images images;
  LinearForward rows;
};

// The code of every output pixel alone, float32 (rows, rank).
struct ConvolutionCode {
  Storage storage;             // of x and light_down, as in LinearBackward
  Images images;
  const void* x;
  std::int64_t rows, rank;
  const void* light_down;      // (rank, depth)
  float* code;
  int threads;
};

// Parameters of a layer to be laid out as panels; the fields are those of LinearForward.
struct LinearPack {
  Storage storage;
  std::int64_t depth, neurons, rank, groups;
  const void *weight, *light_down, *light_up, *gate_weight;
  void* packed_light;          // packed_sizes().light elements of `storage`, or null
  void* packed_weight;         // packed_sizes().weight elements, or null
  int threads;
};

struct PackedSizes {
  std::int64_t light, weight;
};

// The sparse part of a backward call. The light path's products are Projections.
struct LinearBackward {
  Storage storage;             // of grad_y, x, weight and grad_light; bfloat16 only where the kernels say dot_pairs
  const void* grad_y;          // (rows, neurons)
  const void* x;               // (rows, depth)
  std::int64_t x_stride;
  std::int64_t rows, depth, neurons, rank, groups, selected_groups, positions, span;
  const void* weight;          // (neurons, depth)
  const float* code;           // (rows, rank)
  const float* light_up;       // (neurons, rank)
  const std::int32_t* selected;  // (blocks, selected_groups), -1 in slots without a group
  const float* gate;           // (blocks, selected_groups): sigmoid of the selected logits
  bool hard;
  void* grad_light;            // (rows, neurons), gradient of the light path without the gate's share
  float* grad_x;               // (rows, depth), the full path's share; null with grad_logits where not needed
  float* grad_logits;          // (blocks, selected_groups), of slots with a group
  float* grad_weight;          // (neurons, depth) or null
  int threads;
};

// What a backward call does between dense products: grad_y divided between the paths, and the gradient of the logits. Memory
// for grad_full need not be that of one matrix: its rows lie `grad_full_stride` elements apart.
struct GradientSplit {
  Storage storage;             // of grad_y, difference, grad_full and grad_light
  const void* grad_y;          // (rows, neurons)
  const void* difference;      // (rows, neurons), full path less light path
  std::int64_t difference_stride;
  std::int64_t rows, neurons, groups, selected_groups, positions, span;
  const std::int32_t* selected;  // (blocks, selected_groups), -1 in slots without a group
  const float* gate;           // (blocks, selected_groups): sigmoid of the selected logits
  bool hard;
  void* grad_full;             // (rows, neurons), zero where a neuron was not selected
  std::int64_t grad_full_stride;
  void* grad_light;            // (rows, neurons), without the gate's share
  float* grad_logits;          // (blocks, selected_groups), of slots with a group
  int threads;
};

// y = x . weight^T.
struct Projection {
  Storage storage;             // of x and weight; bfloat16 only where the kernels say dot_pairs
  const void* x;               // (rows, depth)
  std::int64_t x_stride;
  std::int64_t rows, depth, neurons;
  const void* weight;          // (neurons, depth)
  float* y;                    // (rows, neurons)
  int threads;
};

struct ProjectionBackward {
  Storage storage;             // of grad_y, x and weight, as in Projection
  const void* grad_y;          // (rows, neurons)
  const void* x;
  std::int64_t x_stride;
  std::int64_t rows, depth, neurons;
  const void* weight;
  float* grad_x;               // (rows, depth) or null
  bool accumulate;             // add to grad_x
  float* grad_weight;          // (neurons, depth) or null
  int threads;
};

// LinearBackward for a convolution: rows are output pixels, the depth is that of ConvolutionForward. Without a selection every
// row wants every neuron: gradients through one plain convolution.
struct ConvolutionBackward {
  Storage storage;             // of x, grad_y, weight and grad_light, as in LinearBackward
  Images images;
  const void* x;
  const void* grad_y;          // (rows, neurons)
  std::int64_t rows, neurons, rank, groups, selected_groups, positions, span;
  const void* weight;          // (neurons, depth)
  const std::int32_t* selected;  // (blocks, selected_groups), -1 in slots without a group; null with one group
  const float* gate;           // (blocks, selected_groups), null with `selected`
  const float* code;           // (rows, rank), null with `selected`
  const float* light_up;       // (neurons, rank), null with `selected`
  bool hard;
  void* grad_light;            // (rows, neurons), null with `selected`
  float* grad_x;               // (batch, height, width, channels); null with grad_logits where not needed
  bool accumulate;             // add to grad_x
  float* grad_logits;          // (blocks, selected_groups), of slots with a group
  float* grad_weight;          // (neurons, depth) or null
  int threads;
};

enum class Activation : int { gelu = 0, gelu_tanh = 1, relu = 2, silu = 3 };

// Groups of fewer hidden units would leave most lanes of panels of their own empty: they share panels, and where few rows
// are multiplied, plain weights are read.
constexpr std::int64_t kFfnPanelGroup = 8;

// One call of an FFN, all of one type but for the noise; see src/midl/ops/reference_ffn.py.
struct FfnForward {
  Storage storage;
  const void* x;               // (rows, depth)
  std::int64_t x_stride;
  std::int64_t rows, depth, hidden, outputs, rank, groups;
  std::int64_t selected_groups;  // by a row; with `threshold`, at most
  float threshold = -__builtin_inff();  // logit that all but a row's first group must reach
  const void* weight;          // (hidden, depth)
  const void* bias;            // (hidden) or null
  const void* value_weight;    // (hidden, depth) or null
  const void* value_bias;      // (hidden) or null
  const void* down_weight;     // (outputs, hidden)
  const void* down_bias;       // (outputs) or null
  const void* light_down;      // (rank, depth)
  const void* light_up;        // (outputs, rank)
  const void* light_hidden;    // (hidden)
  const void* light_bias;      // (outputs)
  const void* gate_weight;     // (groups, rank)
  const void* gate_bias;       // (groups)
  const float* noise;          // (rows, groups) or null
  const void* panels;          // of the weights, as pack_ffn writes them, or null
  bool hard;                   // interpolation weight 1 instead of sigmoid
  Activation activation;
  void* y;                     // (rows, outputs)
  std::int32_t* selected;      // (rows, selected_groups), -1 behind the selected; or null where nobody wants it
  int threads;
};

// Gradients of an FFN through its selected hidden units: those of the weights but for light path and gate.
struct FfnBackward {
  const float* grad_y;         // (rows, outputs)
  const float* x;              // (rows, depth)
  std::int64_t x_stride;
  std::int64_t rows, depth, hidden, outputs, groups, selected_groups;
  const float *weight, *bias, *value_weight, *value_bias, *down_weight, *light_hidden;  // as in FfnForward
  const std::int32_t* selected;  // (rows, selected_groups), -1 in slots without a group
  const float* gate;           // (rows, selected_groups): sigmoid of the selected logits
  bool hard;
  Activation activation;
  float* grad_x;               // (rows, depth) or null
  float* grad_x_of_value;      // (rows, depth), to be added, or null
  float* grad_weight;          // (hidden, depth) or null
  float* grad_value_weight;    // (hidden, depth) or null
  float* grad_down;            // (hidden, outputs) or null: the gradient of down_weight's transpose
  float* grad_bias;            // (hidden)
  float* grad_value_bias;      // (hidden) or null
  float* grad_light_hidden;    // (hidden)
  float* grad_logits;          // (rows, selected_groups), of slots with a group: sum over the group of grad_y . down (h - light_hidden)
  int threads;
};

// The weights of an FFN as panels; the fields are those of FfnForward.
struct FfnPack {
  Storage storage;
  std::int64_t depth, hidden, outputs, rank, groups;
  const void *weight, *value_weight, *down_weight, *light_down, *light_up, *gate_weight;
  void* panels;                // packed_ffn_size() elements
  int threads;
};

struct TopK {
  const float* scores;         // (rows, groups)
  std::int64_t rows, groups, k;
  float threshold;             // as in LinearForward
  std::int32_t* selected;      // (rows, k)
  int threads;
};

struct Kernels {
  const char* name;
  int lanes;
  bool dot_pairs;              // whether bfloat16 is multiplied by instructions of its own
  void (*linear_forward)(const LinearForward&);
  void (*linear_backward)(const LinearBackward&);
  void (*split_gradient)(const GradientSplit&);
  void (*projection)(const Projection&);
  void (*projection_backward)(const ProjectionBackward&);
  void (*convolution_forward)(const ConvolutionForward&);
  void (*convolution_code)(const ConvolutionCode&);
  void (*convolution_backward)(const ConvolutionBackward&);
  PackedSizes (*packed_sizes)(const LinearPack&);
  bool (*wants_weight_panels)(Storage, std::int64_t rows, std::int64_t depth, std::int64_t groups, std::int64_t selected,
                              std::int64_t group_size, bool convolution);
  // Whether linear_backward multiplies what was picked, see picked_backward.hpp.
  bool (*backward_picks)(Storage, std::int64_t rows, std::int64_t groups, std::int64_t selected, std::int64_t group_size);
  void (*pack)(const LinearPack&);
  void (*topk)(const TopK&);
  void (*ffn_forward)(const FfnForward&);
  void (*ffn_backward)(const FfnBackward&);
  std::int64_t (*packed_ffn_size)(const FfnPack&);  // elements; value_weight says whether there is one
  void (*pack_ffn)(const FfnPack&);
};

// One per translation unit of kernels.cpp; which exist depends on the architecture, see cpu.cpp.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_avx512_emulated;
extern const Kernels kernels_amx;
extern const Kernels kernels_amx_emulated;

// Memory of the calling thread, 64-byte aligned, kept for its next call; earlier contents are lost.
char* scratch(std::size_t bytes);

}  // namespace midl
