"""Inference calls of a layer, prepared: small layers are over before a general call has looked at its arguments.

What is prepared belongs to the panels that :mod:`midl.ops.native_packing` keeps and dies with them. Every call checks
again that the parameters are the same and unchanged (native/prepared.cpp) and that nobody wants to see the op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.config import MIDConfig
from midl.ops import dense, dispatch, native
from midl.ops.native_conv2d import image_geometry
from midl.ops.native_packing import Packed, packed_for

__all__ = ["call_prepared"]

# Sizes of inputs that a layer keeps calls for.
_MOST_CALLS = 64


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class _Call(NamedTuple):
    settings: tuple[Any, ...]
    run: Callable[..., Tensor | None]


def call_prepared(
    x: Tensor, parameters: dict[str, Any], config: MIDConfig, window: Window | None = None
) -> Tensor | None:
    """Return the layer's output for x, or None where the call must take the general path.

    The general path raises the errors, packs the panels and shows the op to whoever watches.

    Args:
        x: (..., d) or (B, C, H, W), or anything else that a user may pass.
        parameters: the layer's own dict of them.
        config: the layer's.
        window: stride, padding and dilation of a convolution; None for a linear layer.
    """
    weight = parameters.get("weight")
    packed = packed_for(weight)
    if packed is None or packed.light is None or not dispatch.is_plain_inference(x, weight):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    threads = torch.get_num_threads()
    key = threads, x.numel() if window is None else (x.shape, x.stride())
    settings = config, dispatch.selected_kernels(), window
    call = packed.calls.get(key)
    if call is None or call.settings != settings:
        run = _prepare_linear(packed, x, parameters, config) if window is None else None
        if window is not None:
            run = _prepare_conv2d(packed, x, parameters, config, window)
        if run is None:
            return None
        if len(packed.calls) >= _MOST_CALLS:
            packed.calls.clear()
        call = packed.calls[key] = _Call(settings, run)
    return call.run(x, parameters, threads)


_PARAMETERS = {"weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"}


def _prepare_linear(packed: Packed, x: Tensor, parameters: dict[str, Any], config: MIDConfig) -> Any:
    if not parameters.keys() >= _PARAMETERS:  # pruned, parametrized, a buffer: what it is now is seen by name alone
        return None
    if not _fit(parameters, config):
        return None
    weight = parameters["weight"]
    n, depth = weight.shape
    if config.span != 1 or not _may_be_native() or x.dtype != weight.dtype:
        return None
    if x.dim() == 0 or x.shape[-1] != depth:
        return None
    rows, groups = x.numel() // depth, n // config.group_size
    k = config.num_slots(groups)
    if k == 0:
        return None
    run = dispatch.resolve(
        "linear", x, weight=weight, k=k, group_size=config.group_size, span=1, threshold=config.threshold
    )
    if run not in (native.linear, dense.linear):
        return None
    wide = run is native.linear and native.wants_weight_panels(x.dtype, rows, groups, k, config.group_size)
    if wide and packed.weight is None:
        return None
    prepared = native.prepare_linear(packed, parameters, k, config, wide=wide, dense=run is dense.linear)
    return None if prepared is None else prepared.run


def _prepare_conv2d(packed: Packed, x: Tensor, parameters: dict[str, Any], config: MIDConfig, window: Window) -> Any:
    if not parameters.keys() >= _PARAMETERS or not _fit(parameters, config):
        return None
    weight = parameters["weight"]
    n, channels, *_ = weight.shape
    if x.dtype != weight.dtype or not _may_be_native() or not native.multiplies_as_is(x.dtype):
        return None
    if x.dim() != 4 or x.shape[1] != channels or x.numel() == 0 or weight.dim() != 4:
        return None
    positions = image_geometry(x, weight, *map(list, window))[1:]
    if min(positions) < 1:
        return None
    groups = n // config.group_size
    k = config.num_slots(groups)
    if k == 0:
        return None
    span = 0 if config.select == "image" else config.span
    run = dispatch.resolve(
        "conv2d", x, weight=weight, k=k, group_size=config.group_size, span=span, threshold=config.threshold,
        positions=positions,
    )  # fmt: skip
    product = None
    if run is dense.convolution:
        product = functools.partial(_dense_product, window)
    elif (
        run is not native.convolution
        or not native.wants_weight_panels(x.dtype, x.shape[0] * math.prod(positions), groups, k, config.group_size)
        or packed.weight is None
    ):
        return None
    prepared = native.prepare_conv2d(packed, parameters, x, k, config, window, dense=product)
    return None if prepared is None else prepared.run


def _dense_product(window: Window, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, *window).contiguous(memory_format=torch.channels_last)


def _fit(parameters: dict[str, Any], config: MIDConfig) -> bool:
    """Return whether the shapes of the parameters go together; what does not is an error of the general path."""
    n, *fan_in = parameters["weight"].shape
    groups, rank = n // config.group_size, config.rank
    shapes = {
        "bias": (n,), "light_down": (rank, *fan_in), "light_up": (n, rank), "gate_weight": (groups, rank),
        "gate_bias": (groups,),
    }  # fmt: skip
    return all(parameters[name] is None or parameters[name].shape == shape for name, shape in shapes.items())


def _may_be_native() -> bool:
    return dispatch.selected_kernels() in ("auto", "native", "dense")
