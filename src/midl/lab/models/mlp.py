"""MLP: a ReLU network on flattened inputs."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch
from torch import Tensor, nn

from midl.lab.models.architecture import widest

__all__ = ["MLP"]


@dataclasses.dataclass(frozen=True)
class MLP:
    """A ReLU network on flattened inputs.

    >>> MLP(64, (256, 256), 10).build()
    Sequential(
      (flatten): Flatten(start_dim=1, end_dim=-1)
      (hidden1): Linear(in_features=64, out_features=256, bias=True)
      (relu1): ReLU()
      (hidden2): Linear(in_features=256, out_features=256, bias=True)
      (relu2): ReLU()
      (head): Linear(in_features=256, out_features=10, bias=True)
    )

    Args:
        in_features: inputs after flattening.
        hidden: widths of the hidden layers, the ones that methods may replace. The head stays dense.
        num_classes: outputs.
        dropout: rate behind every hidden layer.
    """

    in_features: int
    hidden: tuple[int, ...]
    num_classes: int
    dropout: float = 0.0

    def build(self) -> nn.Sequential:
        """Return a freshly initialised network on inputs of any shape with ``in_features`` elements per row."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = self.in_features
        for i, (name, out) in enumerate(zip(self.layer_names, self.hidden, strict=True), start=1):
            layers[name] = nn.Linear(width, out)
            layers[f"relu{i}"] = nn.ReLU()
            if self.dropout:
                layers[f"dropout{i}"] = nn.Dropout(self.dropout)
            width = out
        layers["head"] = nn.Linear(width, self.num_classes)
        return nn.Sequential(layers)

    @property
    def layer_names(self) -> list[str]:
        """Qualified names of the hidden layers."""
        return [f"hidden{i}" for i in range(1, len(self.hidden) + 1)]

    def example(self, batch: int = 1) -> Tensor:
        """Return a batch of zeros, (batch, in_features)."""
        return torch.zeros(batch, self.in_features)

    def narrow(self, flops: int) -> MLP:
        """Return the widest version, all hidden layers scaled alike, of at most ``flops`` per input.

        >>> MLP(64, (256, 256), 10).narrow(60_000).hidden
        (140, 140)

        Raises:
            MIDLError: not even one neuron per layer fits.
        """

        def scaled(step: int) -> MLP:
            widths = tuple(max(1, width * step // max(self.hidden)) for width in self.hidden)
            return dataclasses.replace(self, hidden=widths)

        return widest(scaled, max(self.hidden), flops)
