"""onnx_translations: midl's ops as ONNX operators, for torch.onnx.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from midl.errors import MIDLError

__all__ = ["onnx_translations"]


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a table that tells ``torch.onnx.export`` how to write midl's ops: MatMul, Conv, TopK, Where.

    .. code-block:: python

        torch.onnx.export(
            model.eval(), (x,), "model.onnx", custom_translation_table=midl.export.onnx_translations(),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )

    The selection is midl's: ONNX's TopK, too, gives ties to the lowest index, and NaN ranks last. Opset 18 or later.

    Raises:
        MIDLError: onnxscript, which torch's exporter needs as well, is not installed.
    """
    try:
        from midl.export import _onnx_graph
    except ImportError as error:
        raise MIDLError("onnx_translations needs onnxscript: pip install 'midl[export]'") from error
    ops = torch.ops.midl
    return {
        ops.linear.default: _onnx_graph.linear,
        ops.conv2d.default: _onnx_graph.conv2d,
        ops.ffn.default: _onnx_graph.ffn,
    }
