"""Inference calls, prepared: small layers are over before a general call has looked at its arguments.

What is prepared belongs to the panels that :mod:`midl.ops.native_packing` keeps and dies with them. Every call checks
again that the parameters are the same and unchanged (native/prepared.cpp) and that nobody wants to see the op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.config import MIDConfig
from midl.ops import dense, dispatch, native
from midl.ops.native_conv2d import image_geometry
from midl.ops.native_ffn import FFN_NAMES
from midl.ops.native_packing import Packed, packed_for

__all__ = [
    "PreparedCall", "Window", "call_ffn_op_prepared", "call_ffn_prepared", "call_op_prepared", "call_prepared",
    "choices_of", "ffn_fits", "fits", "keep_call",
]  # fmt: skip

# Sizes of inputs that a layer keeps calls for.
_MOST_CALLS = 64


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class PreparedCall(NamedTuple):
    """A call and what it was prepared for beside sizes."""

    settings: tuple[Any, ...]
    run: Callable[..., Any]


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
    if packed is None or packed.light is None or torch.compiler.is_compiling() or not native.infers_plainly(x):
        return None
    threads = torch.get_num_threads()
    key = threads, x.numel() if window is None else (x.shape, x.stride())
    settings = config, dispatch.selected_kernels(), window
    call = packed.calls.get(key)
    if call is None or call.settings != settings:
        prepared = _prepare(packed, x, parameters, choices_of(parameters, config), window)
        if prepared is None:
            return None
        call = keep_call(packed.calls, key, settings, prepared)
    return call.run(x, parameters, threads)


def call_ffn_prepared(x: Tensor, parameters: dict[str, Any], config: MIDConfig, activation: str) -> Tensor | None:
    """:func:`call_prepared` for an FFN.

    Args:
        x: (..., d), or anything else that a user may pass.
        parameters: the layer's own dict of them.
        config: the layer's.
        activation: one of :data:`midl.ops.reference_ffn.ACTIVATIONS`.
    """
    packed = packed_for(parameters.get("weight"))
    if packed is None or packed.weight is None or torch.compiler.is_compiling() or not native.infers_plainly(x):
        return None
    settings = config, dispatch.selected_kernels(), activation
    call = packed.calls.get("ffn")
    if call is None or call.settings != settings:
        prepared = _prepare_ffn(packed, x, parameters, choices_of(parameters, config), activation)
        if prepared is None:
            return None
        call = keep_call(packed.calls, "ffn", settings, prepared)
    return call.run(x, parameters, torch.get_num_threads())


def call_ffn_op_prepared(
    x: Tensor, tensors: Sequence[Tensor | None], choices: native.Choices, activation: str
) -> tuple[Tensor, Tensor] | None:
    """:func:`call_op_prepared` for an FFN; ``tensors`` are the op's from weight to gate_bias."""
    packed = packed_for(tensors[0])
    if packed is None or packed.weight is None or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return None
    parameters = dict(zip(FFN_NAMES, tensors, strict=True))
    settings = choices, dispatch.selected_kernels(), activation
    call = packed.calls.get("ffn op")
    if call is None or call.settings != settings:
        prepared = _prepare_ffn(packed, x, parameters, choices, activation)
        if prepared is None:
            return None
        call = keep_call(packed.calls, "ffn op", settings, prepared)
    return call.run(x, parameters, torch.get_num_threads(), True)


def call_op_prepared(
    x: Tensor, tensors: Sequence[Tensor | None], choices: native.Choices, window: Window | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return ``(y, selected)`` of an op without noise, or None where the call must take the general path.

    For compiled graphs: their calls come by torch's dispatcher, with tensors of which they may have made some anew.

    Args:
        x: of the op.
        tensors: the next arguments of the op, from weight to gate_bias.
        choices: the op's.
        window: stride, padding and dilation of a convolution; None for a linear layer.
    """
    packed = packed_for(tensors[0])
    if packed is None or packed.light is None or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return None
    parameters = dict(zip(_PARAMETERS, tensors, strict=True))
    threads = torch.get_num_threads()
    key = "op", threads, x.numel() if window is None else (x.shape, x.stride())
    settings = choices, dispatch.selected_kernels(), window
    call = packed.calls.get(key)
    if call is None or call.settings != settings:
        prepared = _prepare(packed, x, parameters, choices, window)
        if prepared is None:
            return None
        call = keep_call(packed.calls, key, settings, prepared)
    return call.run(x, parameters, threads, True)


_PARAMETERS = ("weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")


def choices_of(parameters: dict[str, Any], config: MIDConfig) -> native.Choices:
    """Return what a layer with these parameters tells its op."""
    groups = len(parameters["weight"]) // config.group_size
    span = 0 if config.select == "image" else config.span
    return native.Choices(config.num_slots(groups), config.group_size, span, config.interpolation, config.threshold)


def keep_call(calls: dict[Any, PreparedCall], key: Any, settings: tuple[Any, ...], prepared: Any) -> PreparedCall:
    """Keep what was prepared under ``key``, and return it as a call for these settings."""
    if len(calls) >= _MOST_CALLS:
        calls.clear()
    call = calls[key] = PreparedCall(settings, prepared.run)
    return call


def _prepare(
    packed: Packed, x: Tensor, parameters: dict[str, Any], choices: native.Choices, window: Window | None
) -> Any:  # fmt: skip
    """Return the prepared call; None where the general path must be taken."""
    if not parameters.keys() >= set(_PARAMETERS):  # pruned, parametrized, a buffer: seen by name alone
        return None
    if type(parameters["weight"]) not in (nn.Parameter, Tensor):  # a subclass wants to see the op
        return None
    if choices.k == 0 or not fits(parameters, choices.group_size) or not _may_be_native():
        return None
    if x.dtype != parameters["weight"].dtype:
        return None
    if window is None:
        return _prepare_linear(packed, x, parameters, choices)
    return _prepare_conv2d(packed, x, parameters, choices, window)


def _prepare_linear(packed: Packed, x: Tensor, parameters: dict[str, Any], choices: native.Choices) -> Any:
    weight = parameters["weight"]
    n, depth = weight.shape
    if choices.span != 1 or x.dim() == 0 or x.shape[-1] != depth:
        return None
    rows, groups = x.numel() // depth, n // choices.group_size
    run = dispatch.resolve(
        "linear", x, weight=weight, k=choices.k, group_size=choices.group_size, span=1, threshold=choices.threshold
    )
    if run not in (native.linear, dense.linear):
        return None
    wide = run is native.linear and native.wants_weight_panels(
        x.dtype, rows, depth, groups, choices.k, choices.group_size
    )
    if wide and packed.weight is None:
        return None
    return native.prepare_linear(packed, parameters, choices, wide=wide, dense=run is dense.linear)


def _prepare_conv2d(
    packed: Packed, x: Tensor, parameters: dict[str, Any], choices: native.Choices, window: Window
) -> Any:
    weight = parameters["weight"]
    n, channels, *_ = weight.shape
    if not native.multiplies_as_is(x.dtype):
        return None
    if x.dim() != 4 or x.shape[1] != channels or x.numel() == 0 or weight.dim() != 4:
        return None
    positions = image_geometry(x, weight, *map(list, window))[1:]
    if min(positions) < 1:
        return None
    k, group_size = choices.k, choices.group_size
    run = dispatch.resolve(
        "conv2d", x, weight=weight, k=k, group_size=group_size, span=choices.span, threshold=choices.threshold,
        positions=positions,
    )  # fmt: skip
    product, rows = None, x.shape[0] * math.prod(positions)
    if run is dense.convolution:
        product = functools.partial(_dense_product, window)
    elif (
        run is not native.convolution
        or not native.wants_weight_panels(
            x.dtype, rows, weight.shape[1:].numel(), n // group_size, k, group_size, convolution=True
        )
        or packed.weight is None
    ):
        return None
    return native.prepare_conv2d(packed, parameters, x, choices, window, dense=product)


def _prepare_ffn(
    packed: Packed, x: Tensor, parameters: dict[str, Any], choices: native.Choices, activation: str
) -> Any:  # fmt: skip
    weight = parameters["weight"]
    if type(weight) not in (nn.Parameter, Tensor) or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return None
    if not ffn_fits(parameters, choices.group_size):
        return None
    run = dispatch.resolve(
        "ffn", x, weight=weight, k=choices.k, group_size=choices.group_size, threshold=choices.threshold
    )
    return native.prepare_ffn(packed, parameters, choices, activation) if run is native.ffn else None


def _dense_product(window: Window, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, *window).contiguous(memory_format=torch.channels_last)


def fits(parameters: dict[str, Any], group_size: int, *, packed: bool = False) -> bool:
    """Return whether shapes, dtypes and devices of a layer's parameters go together.

    What does not is an error of the general path. With ``packed`` some may be mere shapes.
    """
    n, *fan_in = parameters["weight"].shape
    groups, rank = n // group_size, len(parameters["light_down"])
    shapes = ((n, *fan_in), (n,), (rank, *fan_in), (n, rank), (groups, rank), (groups,))
    return _have_shapes(parameters, _PARAMETERS, shapes, packed)


def ffn_fits(parameters: dict[str, Any], group_size: int, *, packed: bool = False) -> bool:
    """:func:`fits` for an FFN, whose parameters must all be there by name."""
    if not parameters.keys() >= set(FFN_NAMES):  # pruned or parametrized
        return False
    (hidden, depth), n, rank = parameters["weight"].shape, len(parameters["down_weight"]), len(parameters["light_down"])
    groups = hidden // group_size
    shapes = (
        (hidden, depth), (hidden,), (hidden, depth), (hidden,), (n, hidden), (n,), (rank, depth), (n, rank), (hidden,),
        (n,), (groups, rank), (groups,),
    )  # fmt: skip
    return _have_shapes(parameters, FFN_NAMES, shapes, packed)


def _have_shapes(
    parameters: dict[str, Any], names: Sequence[str], shapes: Sequence[tuple[int, ...]], packed: bool
) -> bool:  # fmt: skip
    dtype, devices = parameters["weight"].dtype, ("cpu", "meta") if packed else ("cpu",)
    return all(
        t is None or (t.shape == shape and t.dtype == dtype and t.device.type in devices)
        for t, shape in zip((parameters[name] for name in names), shapes, strict=True)
    )


def _may_be_native() -> bool:
    return dispatch.selected_kernels() in ("auto", "native", "dense")
