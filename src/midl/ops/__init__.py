"""midl's primitive ops, one per layer kind, registered with torch.library.

``midl::linear``, ``midl::conv2d`` and ``midl::ffn`` compute a whole layer: code, light path, gate, selection, full path
of the selected groups and interpolation (docs/formula.md). Each has a backward op, a fake kernel, an autograd rule and
a FLOP formula. Implementations live beside each other in this package and are chosen by :mod:`midl.ops.dispatch`.

Arguments of ``midl::linear``: x (..., T, d); weight (n, d); bias (n) or None; light_down (r, d); light_up (n, r);
gate_weight (N, r) and gate_bias (N), both None for the light gate; noise, the shape of the logits, added to them for
the selection alone, or None; k, groups to select; group_size; span; interpolation ``"sigmoid" | "hard"``; ste
``"selected" | "dense"``; threshold, the least logit of a group to select but for the first, or None. Returns y
(..., T, n) and the selected groups, int32, ascending, (..., blocks, k); with a threshold -1 fills the slots behind
them, and ``padded`` tells the backward op so.

``midl::conv2d`` takes x (B, C, H, W), weight (n, C, kh, kw), light_down (r, C, kh, kw) and stride, padding, dilation;
``span=0`` makes each image one block. It returns y (B, n, H', W') and selected (B, H', blocks, k), or (B, 1, k).

``midl::ffn`` takes x (..., d); weight (m, d) and bias (m) or None of the up-projection; value_weight and value_bias
likewise, None unless gated; down_weight (n, m), down_bias (n) or None; light_down (r, d), light_up (n, r),
light_hidden (m), light_bias (n); gate_weight (N, r), gate_bias (N); noise as above; k; group_size; activation
``"gelu" | "gelu_tanh" | "relu" | "silu"``; interpolation; ste. It returns y (..., n) and selected (..., k).
"""

from midl.ops import conv2d, ffn, linear  # defines the ops
from midl.ops.dispatch import kernels
from midl.ops.flops import register_formulas

__all__ = ["conv2d", "ffn", "kernels", "linear"]

register_formulas()
