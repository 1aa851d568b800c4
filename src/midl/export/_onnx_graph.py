"""The formula of :mod:`midl.ops.reference` in ONNX operators. Imports onnxscript.

torch's exporter calls :func:`linear`, :func:`conv2d` and :func:`ffn` while it builds the graph. Their tensors know
their type and shape; what the operators here return does not, so both are passed along, or asked of the graph where
they may vary.
"""

from __future__ import annotations

import math
from typing import Any

from onnxscript import opset18
from onnxscript.ir import DataType

from midl.errors import MIDLError

__all__ = ["conv2d", "ffn", "linear"]

Value = Any
op: Any = opset18  # its own types are of eager values, not of the symbols that pass here


def linear(
    x: Value, weight: Value, bias: Value, light_down: Value, light_up: Value, gate_weight: Value, gate_bias: Value,
    noise: Value, k: int, group_size: int, span: int, interpolation: str, ste: str, threshold: float | None = None,
) -> tuple[Value, Value]:  # fmt: skip
    """Write ``midl::linear``: y and the selected groups."""
    up = _accumulate_type(x)
    rows = op.Cast(x, to=up)
    y, selected = _interpolate(
        op.MatMul(rows, _transposed(light_down, up)), op.MatMul(rows, _transposed(weight, up)), bias, light_up,
        gate_weight, gate_bias, noise, k, group_size, span, interpolation, threshold, up,
    )  # fmt: skip
    return op.Cast(y, to=x.dtype), selected


def conv2d(
    x: Value, weight: Value, bias: Value, light_down: Value, light_up: Value, gate_weight: Value, gate_bias: Value,
    noise: Value, stride: list[int], padding: list[int], dilation: list[int], k: int, group_size: int, span: int,
    interpolation: str, ste: str, threshold: float | None = None,
) -> tuple[Value, Value]:  # fmt: skip
    """Write ``midl::conv2d``; ``span=0`` makes each image one block."""
    up = _accumulate_type(x)
    images = op.Cast(x, to=up)

    def convolve(filters: Value) -> Value:
        """(B, C, H, W) -> (B, H', W', channels)."""
        pads = [*padding, *padding]
        image = op.Conv(images, op.Cast(filters, to=up), strides=list(stride), pads=pads, dilations=list(dilation))
        return op.Transpose(image, perm=[0, 2, 3, 1])

    code, full = convolve(light_down), convolve(weight)
    image_shape = op.Shape(full)
    if span == 0:
        code, full = (
            op.Reshape(t, _ints(0, -1, filters.shape[0])) for t, filters in ((code, light_down), (full, weight))
        )
    y, selected = _interpolate(
        code, full, bias, light_up, gate_weight, gate_bias, noise, k, group_size, span, interpolation, threshold,
        up,
    )  # fmt: skip
    return op.Cast(op.Transpose(op.Reshape(y, image_shape), perm=[0, 3, 1, 2]), to=x.dtype), selected


def _interpolate(
    code: Value, full: Value, bias: Value, light_up: Value, gate_weight: Value, gate_bias: Value, noise: Value, k: int,
    group_size: int, span: int, interpolation: str, threshold: float | None, up: DataType,
) -> tuple[Value, Value]:  # fmt: skip
    """Write the mix of code (..., T, r) and full path (..., T, n); ``span=0``: all positions are one block."""
    _check_quiet(noise)
    n = light_up.shape[0]
    bias = None if bias is None else op.Cast(bias, to=up)

    def grouped(t: Value) -> Value:
        """(..., n) -> (..., N, group_size)."""
        return op.Reshape(t, op.Concat(op.Shape(t, end=-1), _ints(n // group_size, group_size), axis=0))

    light = op.MatMul(code, _transposed(light_up, up))
    block_code = _block_mean(code, light_up.shape[1], span, up)
    if gate_weight is not None:
        logits = op.Add(op.MatMul(block_code, _transposed(gate_weight, up)), op.Cast(gate_bias, to=up))
    else:
        block_light = op.MatMul(block_code, _transposed(light_up, up))
        block_light = block_light if bias is None else op.Add(block_light, bias)
        logits = op.ReduceMean(grouped(block_light), _ints(-1), keepdims=0)

    mask, selected = _choose(logits, k, threshold, up)

    def spread(t: Value) -> Value:
        """(..., blocks, N) -> (..., T, N, 1), or broadcasting to it."""
        if span > 1:
            block_of_position = op.Div(_positions(code, step=1), _ints(span))
            t = op.Gather(t, block_of_position, axis=-2)
        return op.Unsqueeze(t, _ints(-1))

    light_groups, full_groups = grouped(light), grouped(full)
    mixed = full_groups
    if interpolation == "sigmoid":
        difference = op.Sub(full_groups, light_groups)
        mixed = op.Add(light_groups, op.Mul(spread(op.Sigmoid(logits)), difference))
    y = op.Reshape(op.Where(spread(mask), mixed, light_groups), op.Shape(full))
    return (y if bias is None else op.Add(y, bias)), selected


def ffn(
    x: Value, weight: Value, bias: Value, value_weight: Value, value_bias: Value, down_weight: Value, down_bias: Value,
    light_down: Value, light_up: Value, light_hidden: Value, light_bias: Value, gate_weight: Value, gate_bias: Value,
    noise: Value, k: int, group_size: int, activation: str, interpolation: str, ste: str,
    threshold: float | None = None,
) -> tuple[Value, Value]:  # fmt: skip
    """Write ``midl::ffn``: y and the selected groups."""
    _check_quiet(noise)
    up = _accumulate_type(x)
    rows = op.Cast(x, to=up)

    def linear(t: Value, weights: Value, offset: Value) -> Value:
        y = op.MatMul(t, _transposed(weights, up))
        return y if offset is None else op.Add(y, op.Cast(offset, to=up))

    hidden = _activate(linear(rows, weight, bias), activation, up)
    if value_weight is not None:
        hidden = op.Mul(hidden, linear(rows, value_weight, value_bias))
    code = linear(rows, light_down, None)
    logits = linear(code, gate_weight, gate_bias)
    mask, selected = _choose(logits, k, threshold, up)
    zero = _scalar(0.0, up)
    share = op.Where(mask, op.Sigmoid(logits), zero) if interpolation == "sigmoid" else op.Cast(mask, to=up)
    light_share = op.Sub(_scalar(1.0, up), op.ReduceMean(share, _ints(-1)))

    def grouped(t: Value) -> Value:
        """(..., m) -> (..., N, group_size)."""
        return op.Reshape(t, op.Concat(op.Shape(t, end=-1), _ints(weight.shape[0] // group_size, group_size), axis=0))

    difference = op.Sub(hidden, op.Cast(light_hidden, to=up))
    weighted = op.Mul(grouped(difference), op.Unsqueeze(share, _ints(-1)))
    mixed = op.Reshape(op.Where(op.Unsqueeze(mask, _ints(-1)), weighted, zero), op.Shape(difference))
    light = op.Mul(light_share, linear(code, light_up, None))
    y = op.Add(op.Add(linear(mixed, down_weight, down_bias), light), op.Cast(light_bias, to=up))
    return op.Cast(y, to=x.dtype), selected


def _activate(t: Value, activation: str, up: DataType) -> Value:
    """Write an activation of :mod:`midl.ops.reference_ffn`; ONNX has Gelu from opset 20 on only."""
    if activation == "relu":
        return op.Relu(t)
    if activation == "silu":
        return op.Mul(t, op.Sigmoid(t))
    if activation == "gelu":
        inner = op.Erf(op.Mul(t, _scalar(2**-0.5, up)))
    else:
        cube = op.Mul(op.Mul(t, t), op.Mul(t, _scalar(0.044715, up)))
        inner = op.Tanh(op.Mul(op.Add(t, cube), _scalar((2 / math.pi) ** 0.5, up)))
    return op.Mul(op.Mul(t, _scalar(0.5, up)), op.Add(inner, _scalar(1.0, up)))


def _check_quiet(noise: Value) -> None:
    if noise is not None:
        raise MIDLError("onnx_translations: the model draws exploration noise, expected model.eval() before the export")


def _choose(logits: Value, k: int, threshold: float | None, up: DataType) -> tuple[Value, Value]:
    """Write the selection: the mask (..., N) and the indices, ascending, -1 behind them, int32 (..., k)."""
    lowest = op.Cast(op.Constant(value_float=-math.inf), to=up)
    best, chosen = op.TopK(op.Where(op.IsNaN(logits), lowest, logits), _ints(k), axis=-1)
    nowhere = op.Expand(_false(), op.Shape(logits))
    if threshold is None:
        mask = op.ScatterElements(nowhere, chosen, op.Expand(op.Not(_false()), op.Shape(chosen)), axis=-1)
        ascending, _ = op.TopK(chosen, _ints(k), axis=-1, largest=0)
        return mask, op.Cast(ascending, to=DataType.INT32)
    first = op.Cast(_ints(1, *[0] * (k - 1)), to=DataType.BOOL)
    taken = op.Or(op.GreaterOrEqual(best, _scalar(threshold, up)), first)
    mask = op.ScatterElements(nowhere, chosen, taken, axis=-1)
    behind = _ints(2**31 - 1)
    ascending, _ = op.TopK(op.Where(taken, chosen, behind), _ints(k), axis=-1, largest=0)
    return mask, op.Cast(op.Where(op.Equal(ascending, behind), _ints(-1), ascending), to=DataType.INT32)


def _block_mean(t: Value, channels: int, span: int, up: DataType) -> Value:
    """(..., T, channels) -> (..., blocks, channels): the mean over each block; the last may be short."""
    if span == 0:
        return op.ReduceMean(t, _ints(-2), keepdims=1)
    if span == 1:
        return t
    length = op.Shape(t, start=-2, end=-1)
    missing = op.Mod(op.Neg(length), _ints(span))
    padded = op.Pad(t, op.Concat(_ints(0), missing, axis=0), op.Cast(op.Constant(value_float=0.0), to=up), _ints(-2))
    blocks = op.Reshape(padded, op.Concat(op.Shape(t, end=-2), _ints(-1, span, channels), axis=0))
    sizes = op.Min(op.Sub(length, _positions(t, step=span)), _ints(span))
    return op.Div(op.ReduceSum(blocks, _ints(-2), keepdims=0), op.Unsqueeze(op.Cast(sizes, to=up), _ints(-1)))


def _positions(t: Value, step: int) -> Value:
    """Return 0, step, 2 step, ... below the positions of ``t`` (..., T, channels)."""
    length = op.Squeeze(op.Shape(t, start=-2, end=-1))
    return op.Range(op.Constant(value_int=0), length, op.Constant(value_int=step))


def _accumulate_type(x: Value) -> DataType:
    return DataType.DOUBLE if x.dtype == DataType.DOUBLE else DataType.FLOAT


def _transposed(matrix: Value, up: DataType) -> Value:
    return op.Transpose(op.Cast(matrix, to=up), perm=[1, 0])


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _scalar(value: float, up: DataType) -> Value:
    return op.Cast(op.Constant(value_float=value), to=up)


def _false() -> Value:
    return op.Cast(op.Constant(value_int=0), to=DataType.BOOL)
