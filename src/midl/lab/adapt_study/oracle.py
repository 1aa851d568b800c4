"""The best selection that a converted ReLU network could make, to see what the gate leaves on the table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from midl.layers import MIDLinear
from midl.selection import selection_mask, topk_groups

__all__ = ["select_by_oracle"]


@contextmanager
def select_by_oracle(model: nn.Sequential) -> Iterator[None]:
    """Inside the block, the MIDLinear layers of a ReLU MLP select the groups whose full path changes most what follows.

    The score of a group is the sum over its neurons of (relu(f + b) - relu(l + b))^2 times the squared norm of the
    neuron's outgoing weights: the change of the next layer's input that the selection can prevent. Not computable
    without the full path; the number of groups, light path and weights are those of the model.
    """
    layers = [m for m in model if isinstance(m, (nn.Linear, MIDLinear))]
    handles = []
    for layer, following in itertools.pairwise(layers):
        if isinstance(layer, MIDLinear):
            outgoing = following.weight.detach().square().sum(0)
            handles.append(layer.register_forward_hook(_choose(outgoing)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _choose(outgoing: Tensor) -> Any:
    @torch.no_grad()
    def hook(layer: MIDLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        light = x @ layer.light_down.T @ layer.light_up.T + bias
        full = x @ layer.weight.T + bias
        change = (full.relu() - light.relu()).square() * outgoing
        scores = change.unflatten(-1, (-1, layer.config.group_size)).sum(-1)
        mask = selection_mask(topk_groups(scores, layer.num_selected), layer.num_groups)
        return torch.where(mask.repeat_interleave(layer.config.group_size, dim=-1), full, light)

    return hook
