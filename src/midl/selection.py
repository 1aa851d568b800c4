"""Top-k selection of neuron groups: the reference rule that every kernel follows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["selection_mask", "topk_groups"]


def topk_groups(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` largest scores of each row, in ascending order of index.

    Equal scores go to the lowest index; NaN ranks with -inf, so a row always selects exactly ``k`` groups.

    >>> topk_groups(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
    tensor([[1, 3]], dtype=torch.int32)

    Args:
        scores: (..., N), any floating dtype.
        k: groups to select, 1 <= k <= N.

    Returns:
        int32 indices, (..., k).
    """
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values.to(torch.int32)


def selection_mask(selected: Tensor, num_groups: int) -> Tensor:
    """Return the boolean mask (..., N) that is true at the indices ``selected`` (..., k)."""
    mask = selected.new_zeros((*selected.shape[:-1], num_groups), dtype=torch.bool)
    return mask.scatter(-1, selected.long(), True)
