"""decompositions: midl's ops as plain aten operations, for ExportedProgram.run_decompositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from midl.ops import reference, reference_ffn

__all__ = ["decompositions"]


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return a table that replaces midl's ops by aten operations: the reference implementation, ties included.

    >>> from midl import MIDLinear
    >>> layer = MIDLinear(16, 32, rank=2).eval()
    >>> program = torch.export.export(layer, (torch.randn(4, 16),))
    >>> program = program.run_decompositions(decompositions())
    >>> {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
    {'aten'}

    For core aten, which most backends want, update torch's ``torch.export.default_decompositions()`` with it. Only
    the forward pass is in the table: export models for inference, after ``eval()``.
    """
    ops = torch.ops.midl
    return {
        ops.linear.default: reference.linear,
        ops.conv2d.default: reference.conv2d,
        ops.ffn.default: reference_ffn.ffn,
    }
