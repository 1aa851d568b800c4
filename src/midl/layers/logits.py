"""layer_logits: the gate logits of a layer on its input, as the reference computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from midl.errors import MIDLError
from midl.layers.conv import MIDConv2d
from midl.ops.reference import accumulate_dtype, gate_logits

if TYPE_CHECKING:
    from midl.layers.base import MIDLayer

__all__ = ["layer_logits"]


def layer_logits(layer: MIDLayer, x: Tensor) -> Tensor:
    """Return the gate logits of a layer on its input, one row for every choice it makes: (choices, groups).

    >>> import torch
    >>> from midl import MIDLinear
    >>> layer_logits(MIDLinear(16, 32, rank=2, group_size=4), torch.randn(5, 16)).shape
    torch.Size([5, 8])

    Args:
        layer: any MID-L layer.
        x: as its ``forward`` takes it; half precision is computed in float32.
    """
    if layer.light_down.is_meta:
        raise MIDLError(
            f"{type(layer).__name__}: gate logits are asked for, but the layer is packed for serving, expected "
            "midl.serving.unpack_(model) first"
        )
    up = accumulate_dtype(x)
    span = layer.config.span
    if isinstance(layer, MIDConv2d):
        down = layer.to_conv2d()  # knows how to pad
        down.weight = nn.Parameter(layer.light_down.detach().to(up), requires_grad=False)
        down.bias = None
        code = down((x if x.dim() == 4 else x.unsqueeze(0)).to(up)).movedim(1, -1)
        if layer.config.select == "image":
            code = code.flatten(1, 2)
            span = code.shape[1]
    else:
        rows = x if x.dim() > 2 and span > 1 else x.reshape(-1, x.shape[-1])
        code = rows.to(up) @ layer.light_down.to(up).T
    logits = gate_logits(
        code, layer.bias, layer.light_up, layer.gate_weight, layer.gate_bias, layer.config.group_size, span
    )
    return logits.reshape(-1, layer.num_groups)
