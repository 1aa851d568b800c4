"""Batches of a data set's training rows: some to calibrate on, all in a new order every epoch to train on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from midl.lab.data import Dataset

__all__ = ["CALIBRATION_ROWS", "ShuffledBatches", "calibration_batches"]

CALIBRATION_ROWS = 2048
"""Training rows that the studies adapt with."""


class ShuffledBatches:
    """Inputs and labels of the training rows, augmented where the data set says so.

    Orders and augmentation follow from ``seed`` alone.

    >>> from midl.lab.data import load
    >>> batches = ShuffledBatches(load("digits"), seed=0, batch_size=100)
    >>> len(batches), len(list(batches))
    (15, 15)
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int = 128) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.seeds = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.dataset.train) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        seed = int(torch.randint(2**31, (), generator=self.seeds))
        order = torch.randperm(len(self.dataset.train), generator=torch.Generator().manual_seed(seed))
        for i, rows in enumerate(order.split(self.batch_size)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + i)
                batch = self.dataset.training_batch(rows)
            yield batch


def calibration_batches(dataset: Dataset, seed: int) -> list[Tensor]:
    """Return the inputs of ``CALIBRATION_ROWS`` random training rows, not augmented.

    >>> from midl.lab.data import load
    >>> [len(batch) for batch in calibration_batches(load("digits"), seed=0)]
    [256, 256, 256, 256, 256, 158]
    """
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    return [dataset.batch(dataset.train, rows)[0] for rows in order[:CALIBRATION_ROWS].split(256)]
