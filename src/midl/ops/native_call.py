"""Inference calls of a linear layer, prepared: small layers are over before a general call has looked at its arguments.

What is prepared belongs to the panels that :mod:`midl.ops.native_packing` keeps and dies with them. Every call checks
again that the parameters are the same and unchanged (native/prepared.cpp) and that nobody wants to see the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midl.config import MIDConfig, num_active_groups
from midl.ops import dense, dispatch, native
from midl.ops.native_packing import Packed, packed_for

__all__ = ["call_prepared"]

# Sizes of inputs that a layer keeps calls for.
_MOST_CALLS = 64


class _Call(NamedTuple):
    config: MIDConfig
    kernels: str
    run: Callable[..., Tensor | None]


def call_prepared(x: Tensor, parameters: dict[str, Any], config: MIDConfig) -> Tensor | None:
    """Return a linear layer's output for x, or None where the call must take the general path.

    The general path raises the errors, packs the panels and shows the op to whoever watches.

    Args:
        x: (..., d), or anything else that a user may pass.
        parameters: the layer's own dict of them.
        config: the layer's; a changed configuration must be another object.
    """
    weight = parameters.get("weight")
    packed = packed_for(weight)
    if packed is None or packed.light is None or not dispatch.is_plain_inference(x, weight):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    threads = torch.get_num_threads()
    key = x.numel(), threads
    call = packed.calls.get(key)
    if call is None or call.config is not config or call.kernels != dispatch.selected_kernels():
        call = _prepare(packed, x, parameters, config)
        if call is None:
            return None
        if len(packed.calls) >= _MOST_CALLS:
            packed.calls.clear()
        packed.calls[key] = call
    return call.run(x, parameters, threads)


def _prepare(packed: Packed, x: Tensor, parameters: dict[str, Any], config: MIDConfig) -> _Call | None:
    kernels, weight = dispatch.selected_kernels(), parameters["weight"]
    n, depth = weight.shape
    if config.span != 1 or kernels not in ("auto", "native", "dense") or x.dtype != weight.dtype:
        return None
    if x.dim() == 0 or x.shape[-1] != depth:
        return None
    rows, groups = x.numel() // depth, n // config.group_size
    k = num_active_groups(config.active, groups)
    run = dispatch.resolve("linear", x, weight=weight, k=k, group_size=config.group_size, span=1)
    if run not in (native.linear, dense.linear):
        return None
    wide = run is native.linear and native.wants_weight_panels(rows, groups, k, config.group_size)
    if wide and packed.weight is None:
        return None
    prepared = native.prepare_linear(packed, parameters, k, config, wide=wide, dense=run is dense.linear)
    return None if prepared is None else _Call(config, kernels, prepared.run)
