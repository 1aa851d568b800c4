"""Factors: what remains of a layer that is its light path alone, in plain torch layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from midl.layers.base import MIDLayer
from midl.layers.conv import MIDConv2d
from midl.layers.linear import MIDLinear

__all__ = ["Factors"]


class Factors(nn.Sequential):
    """The two thin dense layers ``down`` and ``up`` that a light path is; made by :func:`midl.serving.factor_`.

    An nn.Sequential of two nn.Linear or two nn.Conv2d, the second 1 x 1. It remembers what it was, so that
    :func:`midl.save` can describe it.

    >>> layer = MIDLinear(64, 128, active=0, rank=8)
    >>> Factors.of(layer)
    Factors(
      (down): Linear(in_features=64, out_features=8, bias=False)
      (up): Linear(in_features=8, out_features=128, bias=True)
    )

    Args:
        down: to the code.
        up: from the code to the output, with the layer's bias.
        layer: what they stand for; its configuration and the name of its dense counterpart are kept.
    """

    def __init__(self, down: nn.Module, up: nn.Module, layer: MIDLayer) -> None:
        super().__init__(OrderedDict(down=down, up=up))
        self.config = layer.config
        self.dense_family = layer.dense_family

    @property
    def weight(self) -> Tensor:
        """Weight of ``up``, (out, rank): some models ask a layer's weight for its dtype or its device."""
        return self.up.weight  # type: ignore[return-value, union-attr]

    @property
    def bias(self) -> Tensor | None:
        """Bias of ``up``, (out,): the layer's."""
        return self.up.bias  # type: ignore[return-value, union-attr]

    @classmethod
    def of(cls, layer: MIDLayer) -> Factors:
        """Return the factors of a MIDLinear or a MIDConv2d; they share its light path's values and its bias."""
        down: nn.Linear | nn.Conv2d
        up: nn.Linear | nn.Conv2d
        rank = layer.light_down.shape[0]
        light_up = layer.light_up
        if isinstance(layer, MIDConv2d):
            down = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,  # type: ignore[arg-type]
                padding_mode=layer.padding_mode, device="meta",  # type: ignore[arg-type]
            )  # fmt: skip
            up = nn.Conv2d(rank, layer.out_channels, 1, device="meta")
            light_up = nn.Parameter(light_up.detach()[:, :, None, None], requires_grad=light_up.requires_grad)
        else:
            assert isinstance(layer, MIDLinear)
            down = nn.Linear(layer.in_features, rank, bias=False, device="meta")
            up = nn.Linear(rank, layer.out_features, device="meta")
        down.weight, up.weight = layer.light_down, light_up
        up.register_parameter("bias", layer.bias)
        return cls(down, up, layer).train(layer.training)
