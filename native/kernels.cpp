// The kernels for one instruction set; the build compiles this file once per set, with MIDL_TABLE naming the table.
#include "convolution_backward.hpp"
#include "ffn_backward.hpp"
#include "picked_backward.hpp"
#include "projection.hpp"

#define MIDL_STRING_OF(x) #x
#define MIDL_STRING(x) MIDL_STRING_OF(x)

namespace midl {

const Kernels MIDL_TABLE = {
    MIDL_STRING(MIDL_NAME), L, kDotPairs, linear_forward, linear_backward, split_gradient, projection, projection_backward,
    convolution_forward, convolution_code, convolution_backward, packed_sizes, wants_weight_panels, backward_picks, pack, topk,
    ffn_forward, ffn_backward, packed_ffn_size, pack_ffn,
};

}  // namespace midl
