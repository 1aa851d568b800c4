"""``midl::conv2d`` and its backward on the GPU: an implicit matrix product over channels-last pixels, no im2col."""

from __future__ import annotations

import torch
from torch import Tensor

from midl.ops.triton.backward import Grads, backward
from midl.ops.triton.forward import forward
from midl.ops.triton.launch import on_device
from midl.ops.triton.linear import contiguous, zero_grads
from midl.ops.triton.rows import Rows, precision

__all__ = ["conv2d", "conv2d_backward"]


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    k: int, group_size: int, span: int, interpolation: str, ste: str, threshold: None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the convolution op; ``span=0`` makes each image one block."""
    rows, height, width = _image_rows(x, weight, stride, padding, dilation, span)
    batch, n = x.shape[0], weight.shape[0]
    choices = (batch, height, rows.blocks_per_sequence, k) if span else (batch, 1, k)
    if rows.count == 0:
        y = x.new_empty((batch, height, width, n)).permute(0, 3, 1, 2)
        return y, x.new_empty(choices, dtype=torch.int32)
    with on_device(x):
        y, selected = forward(
            rows, _channels_last(weight), contiguous(bias), _channels_last(light_down), light_up.contiguous(),
            gate_weight, gate_bias, contiguous(noise), k, group_size, interpolation == "hard", _precision(x),
        )  # fmt: skip
    return y.view(batch, height, width, n).permute(0, 3, 1, 2), selected.view(choices)


def conv2d_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], group_size: int, span: int, interpolation: str, ste: str, needs: list[bool],
    padded: bool = False,
) -> Grads:  # fmt: skip
    """Return the gradients of the seven tensors from x to gate_bias, empty where not needed."""
    rows, height, width = _image_rows(x, weight, stride, padding, dilation, span)
    if rows.count == 0:
        return zero_grads((x, weight, bias, light_down, light_up, gate_weight, gate_bias), needs)
    batch, channels = x.shape[:2]

    def through_filters(grad_code: Tensor) -> tuple[Tensor, Tensor]:
        def through(image: Tensor, of: Tensor, filters: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten.convolution_backward(
                image, of, filters, None, stride, padding, dilation, False, [0, 0], 1, wanted
            )

        image = grad_code.view(batch, height, width, -1).permute(0, 3, 1, 2)
        # Into float32, where the groups' parts wait; of x this product needs the shape alone.
        shape = image.new_empty(1, dtype=torch.float32).expand(x.shape)
        grad_x = through(image.float(), shape, light_down.float(), [True, False, False])[0]
        grad_down = through(image, x, light_down, [False, True, False])[1]
        return grad_x.permute(0, 2, 3, 1).reshape(-1, channels), grad_down

    with on_device(x):
        grad_x, grad_weight, *others = backward(
            grad_y.permute(0, 2, 3, 1).reshape(rows.count, -1).contiguous(),
            selected.reshape(rows.blocks, -1).contiguous(), rows, _channels_last(weight), contiguous(bias),
            _channels_last(light_down), light_up.contiguous(), gate_weight, gate_bias, group_size,
            interpolation == "hard", needs, _precision(x), through_filters,
        )  # fmt: skip
    if needs[0]:
        grad_x = grad_x.view(batch, *x.shape[2:], channels).permute(0, 3, 1, 2)
    if needs[1]:
        grad_weight = grad_weight.view(weight.shape[0], *weight.shape[2:], channels).permute(0, 3, 1, 2)
    return (grad_x, grad_weight, *others)  # type: ignore[return-value]


def _image_rows(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], span: int
) -> tuple[Rows, int, int]:
    """Return the output positions of ``x`` as rows, and the height and width of the output."""
    (batch, channels, *size), kernel = x.shape, weight.shape[2:]
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    positions = width if span else height * width
    rows = Rows(
        x.permute(0, 2, 3, 1).contiguous(), batch * height * width, channels, channels, positions, span or positions,
        taps=kernel[0] * kernel[1],
        geometry=(*size, height, width, kernel[1], *stride, *padding, *dilation),
    )  # fmt: skip
    return rows, height, width


def _channels_last(filters: Tensor) -> Tensor:
    """(n, C, kh, kw) -> (n, kh * kw * C); no copy if the module is in ``torch.channels_last``."""
    return filters.permute(0, 2, 3, 1).flatten(1).contiguous()


def _precision(x: Tensor) -> str:
    # torch 2.9 added a switch per operator, and reading the old one fails once a program has used the new.
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    if convolutions is None:
        return precision(x.dtype, torch.backends.cudnn.allow_tf32)
    return precision(x.dtype, convolutions.fp32_precision == "tf32")
