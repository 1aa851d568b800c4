"""Batches of a data set's training rows in a new order every epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from midl.lab.data import Dataset

__all__ = ["ShuffledBatches"]


class ShuffledBatches:
    """Inputs and labels of the training rows, augmented; the orders follow from ``seed`` alone.

    >>> from midl.lab.data import load
    >>> batches = ShuffledBatches(load("digits"), seed=0, batch_size=100)
    >>> len(batches), len(list(batches))
    (15, 15)
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int = 128) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.random = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.dataset.train) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.dataset.train), generator=self.random)
        for rows in order.split(self.batch_size):
            yield self.dataset.training_batch(rows)
