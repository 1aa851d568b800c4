"""``midl::conv2d`` by the native kernels: output pixels are rows, and no patch is copied (native/convolution.hpp)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.native_backward import (
    Blocks,
    by_dense_products,
    gate_projection,
    only_needed,
    repeat_first,
    through_gate,
)
from midl.ops.native_packing import pack, packed_panels
from midl.ops.reference import Grads

__all__ = ["as_filters", "as_matrix", "conv2d", "conv2d_backward", "conv2d_on_panels", "image_geometry"]

# Positions of a map up to which the gradient of bfloat16 filters is a product with copied windows, and the bytes of a
# copy: few enough to stay near the core.
_SMALL_MAP = 64
_WINDOW_BYTES = 8 << 20


def conv2d(
    kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor,
    gate_weight: Tensor | None, gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], k: int, group_size: int, span: int, interpolation: str, threshold: float,
    full: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)``, y channels-last; ``span=0`` makes each image one block, ``threshold`` may be -inf.

    ``full`` is the full path of every neuron, shaped as y and channels-last, where the caller has computed it.
    """
    y, selected, geometry, positions = _outputs(x, weight, stride, padding, dilation, k, span)
    n, groups, rows = weight.shape[0], weight.shape[0] // group_size, y.numel() // weight.shape[0]
    if rows == 0:
        return y.permute(0, 3, 1, 2), selected

    dtype = x.dtype if kernels.dot_pairs() else torch.float32

    def matrix(t: Tensor) -> Tensor:
        return as_matrix(t, dtype)

    by_panels = full is None and kernels.wants_weight_panels(
        dtype == torch.bfloat16, rows, weight.shape[1:].numel(), groups, k, group_size, True
    )
    weight, light_down = _without_gaps(weight), _without_gaps(light_down)
    light_up = light_up.contiguous()
    gate_weight = None if gate_weight is None else gate_weight.contiguous()
    light, wide = packed_panels(
        kernels, weight, light_down, light_up, gate_weight, group_size, light=True, wide=by_panels, matrix=matrix
    )
    plain = None if by_panels or full is not None else matrix(weight)
    if light is None:
        matrices = [matrix(t) for t in (weight, light_down, light_up, gate_weight) if t is not None]
        light, wide = pack(kernels, *matrices, group_size=group_size, light=True, wide=by_panels)
    light_up, bias, gate_bias = matrix(light_up), _cast(bias, dtype), _cast(gate_bias, dtype)
    noise = _cast(noise, torch.float32)
    kernels.convolution_forward(
        x.dtype == torch.bfloat16, x.data_ptr(), geometry, rows, n, light_down.shape[0], groups, k, threshold,
        positions, span or positions, _address(plain), _address(bias), light_up.data_ptr(), gate_weight is not None,
        _address(gate_bias), _address(noise), _address(light), _address(wide), _address(full), interpolation == "hard",
        y.data_ptr(), selected.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y.permute(0, 3, 1, 2), selected


def conv2d_on_panels(
    kernels: Any, x: Tensor, light: Tensor, weight_panels: Tensor, parameters: dict[str, Any], stride: list[int],
    padding: list[int], dilation: list[int], k: int, group_size: int, span: int, interpolation: str, threshold: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`conv2d` without noise from panels alone, where all ``parameters`` but the biases are mere shapes."""
    weight, learned_gate = parameters["weight"], parameters["gate_weight"] is not None
    y, selected, geometry, positions = _outputs(x, weight, stride, padding, dilation, k, span)
    n, rows = weight.shape[0], y.numel() // weight.shape[0]
    bias, gate_bias = _cast(parameters["bias"], x.dtype), _cast(parameters["gate_bias"], x.dtype)
    if rows > 0:
        kernels.convolution_forward(
            x.dtype == torch.bfloat16, x.data_ptr(), geometry, rows, n, len(parameters["light_down"]), n // group_size,
            # The panels take the place of the weight, which may be null, and of light_up, which may not.
            k, threshold, positions, span or positions, 0, _address(bias), light.data_ptr(), learned_gate,
            _address(gate_bias), 0, light.data_ptr(), weight_panels.data_ptr(), 0, interpolation == "hard",
            y.data_ptr(), selected.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return y.permute(0, 3, 1, 2), selected


def _outputs(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], k: int, span: int
) -> tuple[Tensor, Tensor, list[int], int]:
    """Return y (B, H, W, n) and the selection, to be filled, the fields of ``Images``, and a sequence's positions."""
    geometry, height, width = image_geometry(x, weight, stride, padding, dilation)
    batch = x.shape[0]
    y = huge_pages.empty_where_mapped((batch, height, width, weight.shape[0]), x.dtype)
    choices = (batch, height, -(-width // span), k) if span else (batch, 1, k)
    return y, x.new_empty(choices, dtype=torch.int32), geometry, width if span else height * width


def conv2d_backward(
    kernels: Any, grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], group_size: int, span: int, interpolation: str, needs: list[bool],
    padded: bool = False, densely: bool = False,
) -> Grads:  # fmt: skip
    """Return the gradients for ``ste="selected"``, empty where not needed.

    As in :mod:`midl.ops.native_backward` code and logits are recomputed, the full path is not.
    """
    dtype = x.dtype if kernels.dot_pairs() else torch.float32
    half = dtype == torch.bfloat16
    image = x.to(dtype)
    geometry, height, width = image_geometry(image, weight, stride, padding, dilation)
    batch, channels, *size = x.shape
    (n, rank), k = light_up.shape, selected.shape[-1]
    groups, rows, positions = n // group_size, batch * height * width, width if span else height * width
    need_x, need_weight, need_bias, need_down, need_up, need_gate, need_gate_bias = needs
    grad = grad_y.permute(0, 2, 3, 1).reshape(rows, n).to(dtype).contiguous()
    out: list[Tensor | None]
    if densely:
        out = by_dense_products(
            kernels, _Convolutions(image, stride, padding, dilation), grad, selected, weight, bias, light_down,
            light_up, gate_weight, gate_bias, group_size, positions, span or positions, interpolation, needs, padded,
        )  # fmt: skip
        return only_needed(out, needs, x)
    filters, down, up = as_matrix(weight, dtype), as_matrix(light_down, dtype), light_up.float().contiguous()
    threads = torch.get_num_threads()
    code = up.new_empty(rows, rank)
    kernels.convolution_code(
        half, image.data_ptr(), geometry, rows, rank, down.data_ptr(), code.data_ptr(), threads
    )  # fmt: skip

    blocks = Blocks(rows, positions, span or positions)
    block_code = blocks.mean(code)
    gate_rows, gate_offset = gate_projection(up, bias, gate_weight, gate_bias, group_size)
    chosen = selected.reshape(-1, k)
    index = repeat_first(chosen, chosen).long() if padded else chosen.long()
    gate = torch.addmm(gate_offset, block_code, gate_rows.T).gather(1, index).sigmoid_()

    need_code = need_x or need_down or need_gate or need_gate_bias or need_up or (need_bias and gate_weight is None)
    grad_light = torch.empty_like(grad)
    grad_x = huge_pages.empty_where_mapped((batch, *size, channels), gate.dtype) if need_code else None
    grad_chosen = torch.empty_like(gate)
    grad_weight = gate.new_empty(filters.shape) if need_weight else None
    kernels.convolution_backward(
        half, image.data_ptr(), geometry, grad.data_ptr(), rows, n, rank, groups, k, positions, span or positions,
        filters.data_ptr(), chosen.data_ptr(), gate.data_ptr(), code.data_ptr(), up.data_ptr(), interpolation == "hard",
        grad_light.data_ptr(), _address(grad_x), False, 0 if grad_x is None else grad_chosen.data_ptr(),
        _address(grad_weight), threads,
    )  # fmt: skip

    out = [None, as_filters(grad_weight, weight), None, None, None, None, None]
    out[2] = grad.sum(0, dtype=torch.float32) if need_bias else None
    if grad_x is not None:
        grad_chosen = repeat_first(grad_chosen, chosen) if padded else grad_chosen
        grad_code, out[4], out[5], out[6] = through_gate(
            kernels, grad_light, grad_chosen, index, code, block_code, blocks, up, gate_rows, out[2],
            projection=gate_weight is not None, need_up=need_up,
        )  # fmt: skip
        grad_code, grad_down = grad_code.to(dtype), gate.new_empty(down.shape) if need_down else None
        if need_x or need_down:
            kernels.convolution_backward(
                half, image.data_ptr(), geometry, grad_code.data_ptr(), rows, rank, rank, 1, 1, 1, 1, down.data_ptr(),
                0, 0, 0, 0, True, 0, grad_x.data_ptr() if need_x else 0, True, 0, _address(grad_down), threads,
            )  # fmt: skip
        out[0] = grad_x.permute(0, 3, 1, 2) if need_x else None
        out[3] = as_filters(grad_down, light_down)
    return only_needed(out, needs, x)


class _Convolutions:
    """The products of an image's windows with filters (m, C, kh, kw)."""

    def __init__(self, image: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> None:
        self._image, self._window = image, (stride, padding, dilation)

    def forward(self, filters: Tensor) -> Tensor:
        y = F.conv2d(self._image, filters.contiguous(memory_format=torch.channels_last), None, *self._window)
        # Of one image, 1 x 1 filters and channels first the reshaped view has columns side by side.
        return y.permute(0, 2, 3, 1).reshape(-1, len(filters)).contiguous()

    def backward(
        self, grad: Tensor, filters: Tensor, need_x: bool, need_filters: bool
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        _, height, width = image_geometry(self._image, filters, *self._window)
        by_windows = need_filters and grad.dtype == torch.bfloat16 and height * width <= _SMALL_MAP
        grads = torch.ops.aten.convolution_backward(
            grad.view(-1, height, width, len(filters)).permute(0, 3, 1, 2), self._image,
            filters.contiguous(memory_format=torch.channels_last), None, *self._window, False, [0, 0], 1,
            [need_x, need_filters and not by_windows, False],
        )  # fmt: skip
        return grads[0], self._filters_by_windows(grad, filters, height, width) if by_windows else grads[1]

    def _filters_by_windows(self, grad: Tensor, filters: Tensor, height: int, width: int) -> Tensor:
        """Return the gradient of the filters from copies of the windows, a few images at a time.

        Of small maps oneDNN's convolution takes several times as long; sums over images are float32.
        """
        (stride, padding, dilation), kernel = self._window, filters.shape[2:]
        depth = filters[0].numel()
        images = max(1, _WINDOW_BYTES // (height * width * depth * grad.element_size()))
        total = grad.new_zeros(len(filters), depth, dtype=torch.float32)
        for image, rows in zip(self._image.split(images), grad.split(images * height * width), strict=True):
            (top, left), pixels = padding, image.permute(0, 2, 3, 1)
            padded = F.pad(pixels, (0, 0, left, left, top, top)).contiguous()
            batch, down, right, channel = padded.stride()
            windows = padded.as_strided(
                (len(image), height, width, *kernel, image.shape[1]),
                (batch, down * stride[0], right * stride[1], down * dilation[0], right * dilation[1], channel),
            )
            total += rows.T @ windows.reshape(len(rows), depth)
        return total.view(len(filters), *kernel, -1).permute(0, 3, 1, 2)


def image_geometry(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[list[int], int, int]:
    """Return the fields of ``Images`` (native/kernels.hpp), and height and width of the output."""
    kernel = weight.shape[2:]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return [*x.shape[1:], *x.stride(), *kernel, *stride, *padding, *dilation, height, width], height, width


def _without_gaps(filters: Tensor) -> Tensor:
    if filters.is_contiguous(memory_format=torch.channels_last):
        return filters
    return filters.contiguous()


def as_matrix(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return filters (n, C, kh, kw) as rows in the order kernel row, kernel column, channel; matrices as is."""
    return (t.permute(0, 2, 3, 1).flatten(1) if t.dim() == 4 else t).to(dtype).contiguous()


def as_filters(rows: Tensor | None, like: Tensor) -> Tensor | None:
    """Inverse of :func:`as_matrix` for filters shaped as ``like``."""
    n, channels, *kernel = like.shape
    return None if rows is None else rows.view(n, *kernel, channels).permute(0, 3, 1, 2)


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
