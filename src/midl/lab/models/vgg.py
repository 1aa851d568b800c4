"""VGG: a plain CNN with batch normalisation for 32 x 32 images in colour."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
from torch import Tensor, nn

from midl.lab.models.architecture import widest

__all__ = ["VGG"]

_SIZE = 32
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class VGG:
    """3 x 3 convolutions one after the other; the first of every stage but the first halves the size.

    43 million multiply-adds as it stands: wider than its data need, as trained networks mostly are.

    >>> VGG(10, widths=(8, 16), depths=(1, 2)).layer_names
    ['conv2', 'conv3']
    >>> VGG(10).build()(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])

    The shape of K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    ICLR 2015, with strides for pooling and batch normalisation.

    Args:
        num_classes: outputs.
        widths: channels of every stage.
        depths: convolutions of every stage. Methods may replace all but the very first.
        dropout: rate behind every convolution but the first.
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (1, 1, 2, 3)
    dropout: float = 0.0

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on (rows, 3, 32, 32)."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width, count = _CHANNELS, 0
        for stage, (out, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for i in range(depth):
                count += 1
                stride = 2 if stage and i == 0 else 1
                layers[f"conv{count}"] = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
                layers[f"norm{count}"], layers[f"relu{count}"] = nn.BatchNorm2d(out), nn.ReLU()
                if self.dropout and count > 1:
                    layers[f"dropout{count}"] = nn.Dropout(self.dropout)
                width = out
        layers["pool"] = nn.AdaptiveMaxPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(width, self.num_classes)
        return nn.Sequential(layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def layer_names(self) -> list[str]:
        """Qualified names of the convolutions but the first."""
        return [f"conv{i}" for i in range(2, sum(self.depths) + 1)]

    def example(self, batch: int = 1) -> Tensor:
        """Return a batch of zeros, (batch, 3, 32, 32)."""
        return torch.zeros(batch, _CHANNELS, _SIZE, _SIZE)

    def narrow(self, flops: int) -> VGG:
        """Return the widest version, all widths scaled alike, of at most ``flops`` per input.

        >>> VGG(10, widths=(8, 16), depths=(1, 2)).narrow(1_000_000).widths
        (5, 10)

        Raises:
            MIDLError: not even the narrowest version fits.
        """

        def scaled(step: int) -> VGG:
            widths = tuple(max(1, width * step // max(self.widths)) for width in self.widths)
            return dataclasses.replace(self, widths=widths)

        return widest(scaled, max(self.widths), flops)
