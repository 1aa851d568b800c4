"""midl's primitive ops, one per layer kind, registered with torch.library.

``midl::linear`` and ``midl::conv2d`` compute a whole layer: code, light path, gate, selection, full path of the
selected groups and interpolation (docs/formula.md). Each has a backward op, a fake kernel, an autograd rule and a FLOP
formula. Implementations live beside each other in this package and are chosen by :mod:`midl.ops.dispatch`.

Arguments of ``midl::linear``: x (..., T, d); weight (n, d); bias (n) or None; light_down (r, d); light_up (n, r);
gate_weight (N, r) and gate_bias (N), both None for the light gate; noise, the shape of the logits, added to them for
the selection alone, or None; k, groups to select; group_size; span; interpolation ``"sigmoid" | "hard"``; ste
``"selected" | "dense"``. Returns y (..., T, n) and the selected groups, int32, ascending, (..., blocks, k).

``midl::conv2d`` takes x (B, C, H, W), weight (n, C, kh, kw), light_down (r, C, kh, kw) and stride, padding, dilation;
``span=0`` makes each image one block. It returns y (B, n, H', W') and selected (B, H', blocks, k), or (B, 1, k).
"""

from midl.ops import conv2d, linear  # defines the ops
from midl.ops.dispatch import kernels
from midl.ops.flops import register_formulas

__all__ = ["conv2d", "kernels", "linear"]

register_formulas()
