"""Which architecture the experiments use on which data set."""

from __future__ import annotations

import torch

from midl.lab.data.sets import imdb
from midl.lab.models.architecture import Architecture
from midl.lab.models.mlp import MLP
from midl.lab.models.resnet import ResNet
from midl.lab.models.transformer import Transformer

__all__ = ["architecture_for"]

_HIDDEN = {"digits": (512, 512), "mnist": (1024, 1024), "adult": (256, 256)}
_PHOTOGRAPHS = (3, 32, 32)


def architecture_for(dataset: str, input_shape: tuple[int, ...], num_classes: int) -> Architecture:
    """Return the architecture that the experiments use on a data set.

    A Transformer for imdb, a ResNet for 32 x 32 images in colour, an MLP for everything else.

    >>> architecture_for("mnist", (1, 28, 28), 10)
    MLP(in_features=784, hidden=(1024, 1024), num_classes=10, dropout=0.0)
    >>> architecture_for("cifar10", (3, 32, 32), 10).layer_names[:2]
    ['stage1.conv', 'stage2.conv']
    """
    if dataset == "imdb":
        return Transformer(imdb.VOCABULARY, imdb.TOKENS, num_classes, padding=imdb.PADDING)
    if tuple(input_shape) == _PHOTOGRAPHS:
        return ResNet(num_classes)
    return MLP(torch.Size(input_shape).numel(), _HIDDEN.get(dataset, (512, 512)), num_classes)
