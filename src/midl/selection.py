"""Top-k selection of neuron groups: the reference rule that every kernel follows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["selection_mask", "topk_groups"]


def topk_groups(scores: Tensor, k: int, threshold: float | None = None) -> Tensor:
    """Return the indices of the ``k`` largest scores of each row, in ascending order of index.

    Equal scores go to the lowest index; NaN ranks with -inf, so a row always selects exactly ``k`` groups. With a
    threshold it selects those of them that reach it, and always the first; -1 fills the slots left over.

    >>> topk_groups(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
    tensor([[1, 3]], dtype=torch.int32)
    >>> topk_groups(torch.tensor([[0.0, 2.0, 1.0, 2.0], [0.0, 0.5, 0.0, 0.0]]), 3, threshold=1.5)
    tensor([[ 1,  3, -1],
            [ 1, -1, -1]], dtype=torch.int32)

    Args:
        scores: (..., N), any floating dtype.
        k: groups to select, 1 <= k <= N.
        threshold: least score of a group to select, but for the first; ``None``: any, as -inf.

    Returns:
        int32 indices, (..., k); -1 only behind them.
    """
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    best, order = best[..., :k], order[..., :k]
    if threshold is None:
        return order.sort(dim=-1).values.to(torch.int32)
    reaches = best >= threshold
    chosen = torch.cat((torch.ones_like(reaches[..., :1]), reaches[..., 1:]), -1)
    behind = scores.shape[-1]
    order = torch.where(chosen, order, behind).sort(dim=-1).values
    return torch.where(order == behind, -1, order).to(torch.int32)


def selection_mask(selected: Tensor, num_groups: int) -> Tensor:
    """Return the boolean mask (..., N) that is true at the indices ``selected`` (..., k); -1 is nowhere."""
    # One place more, for the slots without a group.
    mask = selected.new_zeros((*selected.shape[:-1], num_groups + 1), dtype=torch.bool)
    places = torch.where(selected < 0, num_groups, selected).long()
    return mask.scatter(-1, places, True)[..., :num_groups]
