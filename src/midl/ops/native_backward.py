"""Backward of the native ops: kernels for the sparse part and the light path's products, torch for the gate.

Nothing of the forward pass is kept but its inputs and the selection: code and logits are recomputed, the full path is
not needed (native/backward.hpp says why), and nothing of the size (rows, n) is made but the gradient of the light path.
Where dense products are faster (very narrow groups; half precision that dense kernels multiply by tile registers)
:func:`by_dense_products` takes them instead.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.ops import huge_pages
from midl.ops.reference import Grads

__all__ = [
    "Blocks",
    "LinearProducts",
    "Products",
    "by_dense_products",
    "gate_projection",
    "linear_backward",
    "only_needed",
    "repeat_first",
    "through_gate",
]


def linear_backward(
    kernels: Any, grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int, span: int,
    interpolation: str, needs: list[bool], padded: bool = False, densely: bool = False,
) -> Grads:  # fmt: skip
    """Return the gradients for ``ste="selected"``, empty where not needed.

    Half precision is multiplied as it is where the kernels have instructions for it, else in float32; sums are float32.

    ``padded``: slots of ``selected`` may be -1. ``densely``: through products of all neurons.
    """
    n, depth = weight.shape
    rank, groups, positions, k = light_down.shape[0], n // group_size, x.shape[-2], selected.shape[-1]
    need_x, need_weight, need_bias, need_down, need_up, need_gate, need_gate_bias = needs
    dtype = x.dtype if kernels.dot_pairs() else torch.float32
    flat = _rows(x, depth, dtype)
    grad = _rows(grad_y, n, dtype)
    out: list[Tensor | None]
    if densely:
        out = by_dense_products(
            kernels, LinearProducts(flat), grad, selected, weight, bias, light_down, light_up, gate_weight, gate_bias,
            group_size, positions, span, interpolation, needs, padded,
        )  # fmt: skip
        out[0] = None if out[0] is None else out[0].view(x.shape)
        return only_needed(out, needs, x)
    down, up = light_down.to(dtype).contiguous(), light_up.float().contiguous()
    code = _project(kernels, flat, down)

    blocks = Blocks(flat.shape[0], positions, span)
    block_code = blocks.mean(code)
    gate_rows, gate_offset = gate_projection(up, bias, gate_weight, gate_bias, group_size)
    chosen = selected.reshape(-1, k)
    index = repeat_first(chosen, chosen).long() if padded else chosen.long()
    gate = torch.addmm(gate_offset, block_code, gate_rows.T).gather(1, index).sigmoid_()

    full_weight = weight.to(dtype).contiguous()
    need_code = need_x or need_down or need_gate or need_gate_bias or need_up or (need_bias and gate_weight is None)
    grad_light = torch.empty_like(grad)
    grad_x = huge_pages.empty_where_mapped(flat.shape, gate.dtype) if need_code else None
    grad_chosen = torch.empty_like(gate)
    grad_weight = huge_pages.empty_where_mapped(full_weight.shape, torch.float32) if need_weight else None
    kernels.linear_backward(
        dtype == torch.bfloat16, grad.data_ptr(), flat.data_ptr(), flat.stride(0), flat.shape[0], depth, n, rank,
        groups, k, positions, span, full_weight.data_ptr(), code.data_ptr(), up.data_ptr(), chosen.data_ptr(),
        gate.data_ptr(), interpolation == "hard", grad_light.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(),
        grad_chosen.data_ptr(), 0 if grad_weight is None else grad_weight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip

    out = [None, grad_weight, None, None, None, None, None]
    grad_bias = grad.sum(0, dtype=torch.float32) if need_bias else None
    if grad_x is not None:
        grad_chosen = repeat_first(grad_chosen, chosen) if padded else grad_chosen
        grad_code, out[4], out[5], out[6] = through_gate(
            kernels, grad_light, grad_chosen, index, code, block_code, blocks, up, gate_rows, grad_bias,
            projection=gate_weight is not None, need_up=need_up,
        )  # fmt: skip
        out[0] = grad_x.view(x.shape)
        out[3] = torch.empty_like(down, dtype=torch.float32) if need_down else None
        if need_x or need_down:
            _add_gradients(kernels, grad_code.to(dtype), flat, down, grad_x if need_x else None, out[3])
    out[2] = grad_bias
    return only_needed(out, needs, x)


class Products(Protocol):
    """The products of a layer's input with rows of filters, all of them, by torch."""

    def forward(self, filters: Tensor) -> Tensor:
        """Filters as the layer's weight -> (rows, number of filters)."""

    def backward(
        self, grad: Tensor, filters: Tensor, need_x: bool, need_filters: bool
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Return the gradients of the input and of the filters, from that of :meth:`forward`'s result."""


class LinearProducts:
    """Of x (rows, d) with filters (m, d)."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def forward(self, filters: Tensor) -> Tensor:
        """Return x . filters^T."""
        return F.linear(self._x, filters)

    def backward(
        self, grad: Tensor, filters: Tensor, need_x: bool, need_filters: bool
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Return the gradients of x and of the filters."""
        return grad @ filters if need_x else None, grad.T @ self._x if need_filters else None


def by_dense_products(
    kernels: Any, products: Products, grad: Tensor, selected: Tensor, weight: Tensor, bias: Tensor | None,
    light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int,
    positions: int, span: int, interpolation: str, needs: list[bool], padded: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients for ``ste="selected"`` through products of all neurons, zeros where one was not selected.

    Of many rows one product gives code and full path less light path, whose filters are ``weight - light_up .
    light_down``, and one more the gradients of x, weight and light_down; of few rows such filters would cost more than
    they save. What lies between is a pass over the rows.

    Args:
        kernels: the extension.
        products: of the input, in the dtype of ``grad``.
        grad: of the output, (rows, n).
        selected: as the forward pass gave it; the parameters are those of the layer as well.
    """
    need_x, need_weight, need_bias, need_down, need_up, *_ = needs
    (rows, n), dtype, rank, k = grad.shape, grad.dtype, light_up.shape[1], selected.shape[-1]
    up, joined = light_up.float().contiguous(), rows > weight[0].numel()
    if joined:
        less_light = weight.float() - (up @ light_down.float().flatten(1)).view(weight.shape)
        difference = products.forward(torch.cat([less_light, light_down.float()]).to(dtype))
        code = difference[:, n:].float()
    else:
        code = products.forward(light_down.to(dtype))
        difference = products.forward(weight.to(dtype)).addmm_(code, up.T.to(dtype), alpha=-1)
        code = code.float()
    blocks = Blocks(rows, positions, span)
    block_code = blocks.mean(code)
    gate_rows, gate_offset = gate_projection(up, bias, gate_weight, gate_bias, group_size)
    chosen = selected.reshape(-1, k)
    index = repeat_first(chosen, chosen).long() if padded else chosen.long()
    gate = torch.addmm(gate_offset, block_code, gate_rows.T).gather(1, index).sigmoid_()

    grads = grad.new_empty(rows, n + rank if joined else n)
    grad_light, grad_chosen = torch.empty_like(grad), torch.empty_like(gate)
    kernels.split_gradient(
        dtype == torch.bfloat16, grad.data_ptr(), difference.data_ptr(), difference.stride(0), rows, n,
        n // group_size, k,
        positions, span, chosen.data_ptr(), gate.data_ptr(), interpolation == "hard", grads.data_ptr(),
        grads.stride(0), grad_light.data_ptr(), grad_chosen.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    out: list[Tensor | None] = [None] * 7
    out[2] = grad.sum(0, dtype=torch.float32) if need_bias else None
    grad_code, out[4], out[5], out[6] = through_gate(
        kernels, grad_light, repeat_first(grad_chosen, chosen) if padded else grad_chosen, index, code, block_code,
        blocks, up, gate_rows, out[2], projection=gate_weight is not None, need_up=need_up,
    )  # fmt: skip
    if joined:
        grads[:, n:] = grad_code
        filters = torch.cat([weight, light_down]).to(dtype)
        out[0], grad_filters = products.backward(grads, filters, need_x, need_weight or need_down)
        if grad_filters is not None:
            out[1], out[3] = grad_filters[:n], grad_filters[n:]
        return out
    out[0], out[1] = products.backward(grads, weight.to(dtype), need_x, need_weight)
    grad_x, out[3] = products.backward(grad_code.to(dtype), light_down.to(dtype), need_x, need_down)
    if grad_x is not None and out[0] is not None:
        out[0] += grad_x
    return out


def only_needed(grads: list[Tensor | None], needs: list[bool], x: Tensor) -> Grads:
    """Return the gradients in the dtype of x, empty where not needed."""
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if g is None or not need else g.to(x.dtype) for g, need in zip(grads, needs, strict=True)
    )


def repeat_first(values: Tensor, chosen: Tensor) -> Tensor:
    """Return ``values`` (blocks, k) with each block's first one in the slots that have no group.

    As indices they can be gathered and scattered; scattered gradients are then written twice, but the same.
    """
    return torch.where(chosen < 0, values[:, :1], values)


def _project(kernels: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return x (rows, d) . weight (n, d) transposed, in float32."""
    y = x.new_empty(len(x), len(weight), dtype=torch.float32)
    kernels.projection(
        x.dtype == torch.bfloat16, x.data_ptr(), x.stride(0), *x.shape, len(weight), weight.data_ptr(), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _add_gradients(
    kernels: Any, grad_y: Tensor, x: Tensor, weight: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Add to ``grad_x`` and set ``grad_weight``, where wanted, the gradients of :func:`_project`."""
    kernels.projection_backward(
        x.dtype == torch.bfloat16, grad_y.data_ptr(), x.data_ptr(), x.stride(0), *x.shape, len(weight),
        weight.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(), True,
        0 if grad_weight is None else grad_weight.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _rows(t: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous().view(-1, width)


def gate_projection(
    up: Tensor, bias: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Return the gate's rows (N, r) and offsets (N); the light gate is a projection by the group means of light_up."""
    if gate_weight is not None and gate_bias is not None:
        return gate_weight.float(), gate_bias.float()
    rows = up.view(-1, group_size, up.shape[1]).mean(1)
    return rows, up.new_zeros(len(rows)) if bias is None else bias.float().view(-1, group_size).mean(1)


def through_gate(
    kernels: Any, grad_light: Tensor, grad_chosen: Tensor, index: Tensor, code: Tensor, block_code: Tensor,
    blocks: Blocks, up: Tensor, gate_rows: Tensor, grad_bias: Tensor | None, *, projection: bool, need_up: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of code, light_up, gate_weight and gate_bias; the light gate's share goes into grad_bias.

    ``grad_light`` (rows, n) lacks the gate's share, and its products are computed in its dtype; ``grad_chosen``
    (blocks, k) is that of the logits at ``index``.
    """
    groups = len(gate_rows)
    grad_logits = grad_chosen.new_zeros(len(index), groups).scatter_(1, index, grad_chosen)
    grad_gate_rows = grad_logits.T @ block_code
    grad_code = blocks.spread(grad_logits @ gate_rows)
    grad_up = torch.empty_like(up) if need_up else None
    dtype = grad_light.dtype
    _add_gradients(kernels, grad_light, code.to(dtype), up.to(dtype), grad_code, grad_up)
    if projection:
        return grad_code, grad_up, grad_gate_rows, grad_logits.sum(0)
    if grad_up is not None:
        shares = grad_up.view(groups, -1, up.shape[1])
        shares.add_(grad_gate_rows.unsqueeze(1), alpha=1 / shares.shape[1])
    if grad_bias is not None:
        biases = grad_bias.view(groups, -1)
        biases.add_(grad_logits.sum(0).unsqueeze(1), alpha=1 / biases.shape[1])
    return grad_code, grad_up, None, None


class Blocks:
    """Rows that share a selection: means over a block's rows, and shares of a block's gradient for its rows."""

    def __init__(self, rows: int, positions: int, span: int) -> None:
        self.span = span
        if span == 1:
            return
        row = torch.arange(rows)
        self.block = row // positions * -(-positions // span) + row % positions // span
        self.sizes = torch.bincount(self.block).unsqueeze(1)

    def sum(self, values: Tensor) -> Tensor:
        """(rows, r) -> (blocks, r)."""
        if self.span == 1:
            return values
        return values.new_zeros(len(self.sizes), values.shape[1]).index_add_(0, self.block, values)

    def mean(self, code: Tensor) -> Tensor:
        """(rows, r) -> (blocks, r)."""
        return code if self.span == 1 else self.sum(code) / self.sizes

    def repeat(self, values: Tensor) -> Tensor:
        """(blocks, r) -> (rows, r), each block's for all of its rows."""
        return values if self.span == 1 else values[self.block]

    def spread(self, grad: Tensor) -> Tensor:
        """(blocks, r) -> (rows, r)."""
        return grad if self.span == 1 else (grad / self.sizes)[self.block]
