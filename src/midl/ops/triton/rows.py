"""The rows of a call: what a linear layer's positions and a convolution's output pixels have in common."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Rows", "linear_rows", "precision"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Input rows in memory and how they share selections.

    ``geometry`` is None for a linear layer, else (H, W, H', W', kw, stride y, x, padding y, x, dilation y, x) of a
    convolution over the channels-last image ``x``; every output pixel is then a row and has ``taps`` filter taps.
    """

    x: Tensor
    count: int
    channels: int
    stride: int
    positions: int
    span: int
    taps: int = 1
    geometry: tuple[int, ...] | None = None

    @property
    def blocks_per_sequence(self) -> int:
        """Selection blocks that ``positions`` neighbouring rows form."""
        return -(-self.positions // self.span)

    @property
    def blocks(self) -> int:
        """Selection blocks of the whole call."""
        return self.count if self.span == 1 else self.count // self.positions * self.blocks_per_sequence

    @property
    def pixels(self) -> int:
        """Input vectors of ``channels`` values in x."""
        return self.x.numel() // self.channels

    @property
    def fan_in(self) -> int:
        """Inputs of one neuron."""
        return self.channels * self.taps


def linear_rows(x: Tensor, span: int) -> Rows:
    """Return the rows of a linear layer's input (..., T, d); a copy is made only where the features are strided."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1 or flat.stride(0) < 0:
        flat = flat.contiguous()
    return Rows(flat, flat.shape[0], flat.shape[1], flat.stride(0), x.shape[-2], span)


def precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """Return how float32 products are computed; halves always use Tensor Cores exactly."""
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"
