"""The models of the experiments: one architecture per data set, built dense; methods replace its layers."""

from midl.lab.models.architecture import Architecture, describe
from midl.lab.models.choose import architecture_for
from midl.lab.models.mlp import MLP
from midl.lab.models.resnet import ResNet
from midl.lab.models.transformer import Transformer
from midl.lab.models.vgg import VGG

__all__ = ["MLP", "VGG", "Architecture", "ResNet", "Transformer", "architecture_for", "describe"]
