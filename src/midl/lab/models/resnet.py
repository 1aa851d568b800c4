"""ResNet: a small residual CNN with batch normalisation for 32 x 32 images in colour."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
from torch import Tensor, nn

from midl.lab.models.architecture import widest

__all__ = ["ResNet"]

_SIZE = 32
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A stem and stages, each a 3 x 3 convolution that halves the size and, from the second on, a residual block.

    40 million multiply-adds as it stands: few enough to train on a CPU, wide enough to learn CIFAR-10 with some
    redundancy. Of its 3, 7 and 14 groups of 16 channels 45 % are 1, 3 and 6; of 4, 8 and 16 groups they would be a half
    in places.

    >>> ResNet(10, widths=(8, 16, 32)).layer_names
    ['stage1.conv', 'stage2.conv', 'stage2.residual.body.conv1', 'stage2.residual.body.conv2']
    >>> ResNet(10).build()(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])

    The shape of K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, as cut down to nine layers by
    D. Page, "How to Train Your ResNet", 2018, and made narrower again.

    Args:
        num_classes: outputs.
        widths: channels of the stem and of every stage. Methods may replace the stages' convolutions.
        dropout: rate behind every stage.
    """

    num_classes: int
    widths: tuple[int, ...] = (32, 48, 112, 224)
    dropout: float = 0.0

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on (rows, 3, 32, 32)."""
        stem, *stages = self.widths
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(_convolution(_CHANNELS, stem)))
        width = stem
        for i, out in enumerate(stages, start=1):
            layers[f"stage{i}"] = self._stage(width, out, residual=i > 1)
            width = out
        layers["pool"] = nn.AdaptiveMaxPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(width, self.num_classes)
        return nn.Sequential(layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _stage(self, width: int, out: int, residual: bool) -> nn.Sequential:
        layers = _convolution(width, out, stride=2)
        if residual:
            body = _convolution(out, out, suffix="1") | _convolution(out, out, suffix="2")
            layers["residual"] = _Residual(nn.Sequential(body))
        if self.dropout:
            layers["dropout"] = nn.Dropout(self.dropout)
        return nn.Sequential(layers)

    @property
    def layer_names(self) -> list[str]:
        """Qualified names of the stages' convolutions."""
        residual = ("residual.body.conv1", "residual.body.conv2")
        stages = range(1, len(self.widths))
        return [f"stage{i}.{name}" for i in stages for name in ("conv", *(residual if i > 1 else ()))]

    def example(self, batch: int = 1) -> Tensor:
        """Return a batch of zeros, (batch, 3, 32, 32)."""
        return torch.zeros(batch, _CHANNELS, _SIZE, _SIZE)

    def narrow(self, flops: int) -> ResNet:
        """Return the widest version, all widths scaled alike, of at most ``flops`` per input.

        >>> ResNet(10, widths=(8, 16, 32)).narrow(1_000_000).widths
        (3, 7, 15)

        Raises:
            MIDLError: not even the narrowest version fits.
        """

        def scaled(step: int) -> ResNet:
            widths = tuple(max(1, width * step // max(self.widths)) for width in self.widths)
            return dataclasses.replace(self, widths=widths)

        return widest(scaled, max(self.widths), flops)


class _Residual(nn.Module):
    """Its body's output added to its input. The body is a plain nn.Sequential, whose neurons midl.adapt may regroup."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _convolution(width: int, out: int, stride: int = 1, suffix: str = "") -> OrderedDict[str, nn.Module]:
    layers = (nn.Conv2d(width, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
    return OrderedDict(zip((f"conv{suffix}", f"norm{suffix}", f"relu{suffix}"), layers, strict=True))
