"""magnitude: the trained dense network without the neurons of smallest weights, the same ones for every input.

It keeps the share of neurons that MID-L has active, and is fine-tuned as a converted network is: what differs is that
the choice does not depend on the input. It needs fewer FLOPs than MID-L, which also pays for a light path and a gate.

Source: H. Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710 (by sums of absolute values).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from midl.adaptation.calibrate import weight_of
from midl.errors import MIDLError
from midl.lab.methods.method import Budget, Method, Substitute, replace_layers
from midl.lab.models import Architecture

__all__ = ["METHOD", "Pruned"]


class Pruned(Substitute):
    """A linear layer or a convolution of which only the neurons of largest weight norm are left; the others give 0.

    >>> layer = nn.Linear(8, 4)
    >>> Pruned(layer, keep=3)(layer.weight)[:, layer.weight.norm(dim=1).argmin()]
    tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
    """

    kept: Tensor

    def __init__(self, dense: nn.Module, keep: int) -> None:
        super().__init__()
        if not isinstance(dense, (nn.Linear, nn.Conv2d)):
            raise MIDLError(f"Pruned: dense is a {type(dense).__name__}, expected nn.Linear or nn.Conv2d")
        kept = dense.weight.detach().flatten(1).norm(dim=1).topk(keep).indices.sort().values
        self.register_buffer("kept", kept)
        self.weight = nn.Parameter(dense.weight.detach()[kept])
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach()[kept])
        self.neurons, self.full_neurons = dense.weight.shape[0], keep
        self._convolution = (dense.stride, dense.padding, dense.dilation) if isinstance(dense, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, as wide as the dense layer's."""
        if self._convolution is None:
            out, dim = F.linear(x, self.weight, self.bias), -1
        else:
            out, dim = F.conv2d(x, self.weight, self.bias, *self._convolution), 1  # type: ignore[arg-type]
        shape = list(out.shape)
        shape[dim] = self.neurons
        return out.new_zeros(shape).index_copy(dim, self.kept, out)


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    def prune(dense: nn.Module) -> Pruned:
        return Pruned(dense, max(1, round(budget.active * len(weight_of(dense)))))

    return replace_layers(teacher or architecture.build(), architecture.layer_names, prune)


METHOD = Method("magnitude", "magnitude pruned", _build, teacher=True, own_modules=True)
