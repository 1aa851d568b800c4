"""Taking a converted model out of PyTorch: to plain aten for torch.export and AOTInductor, and to ONNX.

Exporters see each layer as one node, ``midl::linear``, ``midl::conv2d`` or ``midl::ffn``, which needs midl where it
runs.
:func:`decompositions` and :func:`onnx_translations` put its formula in the node's place, so that the program runs
without midl. It then computes every neuron and masks: the same outputs, but no computation saved.
"""

from midl.export.aten import decompositions
from midl.export.onnx import onnx_translations

__all__ = ["decompositions", "onnx_translations"]
