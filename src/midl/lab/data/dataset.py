"""Dataset: the rows of a train and a test split and the training statistics that standardise both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from midl.errors import DataError

__all__ = ["NO_STATISTICS", "Arrays", "Augment", "Dataset", "Split", "in_random_order", "rows_for_all"]

Augment = Callable[[Tensor], Tensor]
"""From stored rows to changed ones of the same shape and dtype; random numbers come from torch's generator."""


NO_STATISTICS = np.empty(0, np.float32)
"""Stands for mean and standard deviation where there is nothing to standardise."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A decoded data set as stored in the cache.

    Args:
        train_x: (rows, ...) uint8 or float32; token ids are int16.
        train_y: (rows,) int64 class indices.
        test_x: like ``train_x``.
        test_y: like ``train_y``.
        mean: of the training rows, broadcastable to one row; ``NO_STATISTICS`` where rows are token ids.
        std: of the training rows, above 0, broadcastable to one row; ``NO_STATISTICS`` likewise.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def fingerprint(self) -> str:
        """Return a hash of names, dtypes, shapes and content."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            array = np.ascontiguousarray(getattr(self, field.name))
            digest.update(f"{field.name} {array.dtype.str} {array.shape};".encode())
            digest.update(array.data)
        return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows and labels: ``x`` (rows, ...) as stored, ``y`` (rows,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    Args:
        name: as given to :func:`midl.lab.data.load`.
        num_classes: labels are 0 to ``num_classes - 1``.
        train: rows to learn from.
        test: rows to score on; nothing is ever fitted to them.
        mean: standardisation, from training rows alone; ``None`` where inputs are token ids.
        std: likewise.
        fingerprint: hash of all rows, labels and statistics.
        augment: what training does to its rows; ``None``: nothing.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    mean: Tensor | None
    std: Tensor | None
    fingerprint: str
    augment: Augment | None = None

    @classmethod
    def from_arrays(cls, name: str, num_classes: int, arrays: Arrays, augment: Augment | None = None) -> Dataset:
        """Wrap decoded arrays without copying them."""
        t = {f.name: torch.from_numpy(getattr(arrays, f.name)) for f in dataclasses.fields(Arrays)}
        mean, std = (t[name] if t[name].numel() else None for name in ("mean", "std"))
        return cls(
            name, num_classes, Split(t["train_x"], t["train_y"]), Split(t["test_x"], t["test_y"]), mean, std,
            arrays.fingerprint(), augment,
        )  # fmt: skip

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input row."""
        return tuple(self.train.x.shape[1:])

    def batch(self, split: Split, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of the chosen rows of ``split``.

        Inputs are standardised, float32, or token ids, int64.
        """
        return self._inputs(split.x[rows]), split.y[rows]

    def training_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and labels of the chosen training rows, augmented where the data set says so.

        Augmentation draws from torch's global generator, so that a seed decides it.
        """
        stored = self.train.x[rows]
        return self._inputs(stored if self.augment is None else self.augment(stored)), self.train.y[rows]

    def _inputs(self, stored: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return stored.long()
        return (stored.float() - self.mean) / self.std

    def hold_out(self, fraction: float = 0.2, seed: int = 0) -> Dataset:
        """Return a data set whose test rows are a random part of the training rows; the test rows are out of sight.

        For choosing a recipe. ``seed`` decides which rows, on every machine the same.

        Raises:
            DataError: ``fraction`` leaves no row on one side.
        """
        rows = len(self.train)
        held = int(rows * fraction)
        if not 0 < held < rows:
            raise DataError(f"{self.name}: hold_out fraction={fraction!r} of {rows} rows, expected rows on both sides")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
        test, train = order[:held], order[held:]
        return dataclasses.replace(
            self,
            train=Split(self.train.x[train], self.train.y[train]),
            test=Split(self.train.x[test], self.train.y[test]),
            fingerprint=f"{self.fingerprint}-held-out-{fraction}-{seed}",
        )

    def subset(self, fraction: float, seed: int = 0) -> Dataset:
        """Return a data set with a random part of the training rows, the same part of every class; statistics stay.

        Every class keeps at least one row. ``seed`` decides which rows, on every machine the same.

        Raises:
            DataError: ``fraction`` is not in (0, 1].
        """
        self._check_fraction("subset", fraction, 0 < fraction <= 1, "(0, 1]")
        generator = np.random.default_rng(seed)
        kept = []
        for label in range(self.num_classes):
            of_class = generator.permutation(np.flatnonzero(self.train.y.numpy() == label))
            kept.append(of_class[: max(1, round(len(of_class) * fraction))])
        rows = torch.from_numpy(np.sort(np.concatenate(kept)))
        return dataclasses.replace(
            self,
            train=Split(self.train.x[rows], self.train.y[rows]),
            fingerprint=f"{self.fingerprint}-subset-{fraction}-{seed}",
        )

    def corrupt_labels(self, fraction: float, seed: int = 0) -> Dataset:
        """Return a data set where a random part of the training labels is drawn anew, uniformly from all classes.

        By chance some of those stay right, as in C. Zhang et al., "Understanding deep learning requires rethinking
        generalization", ICLR 2017. Test labels stay. ``seed`` decides rows and labels, on every machine the same.

        Raises:
            DataError: ``fraction`` is not in [0, 1].
        """
        self._check_fraction("corrupt_labels", fraction, 0 <= fraction <= 1, "[0, 1]")
        generator = np.random.default_rng(seed)
        rows = generator.permutation(len(self.train))[: round(len(self.train) * fraction)]
        labels = self.train.y.clone()
        labels[torch.from_numpy(rows)] = torch.from_numpy(generator.integers(0, self.num_classes, len(rows)))
        return dataclasses.replace(
            self,
            train=Split(self.train.x, labels),
            fingerprint=f"{self.fingerprint}-random-labels-{fraction}-{seed}",
        )

    def _check_fraction(self, method: str, fraction: float, fits: bool, expected: str) -> None:
        if not fits:
            raise DataError(f"{self.name}: {method} fraction={fraction!r}, expected a number in {expected}")


def in_random_order(labels: Tensor) -> bool:
    """Return whether neighbouring rows have the same label about as often as in a random order (within 6 deviations).

    Some sources keep their rows sorted by class, such as the hub's imdb.

    >>> in_random_order(torch.arange(100) % 2), in_random_order(torch.arange(100) // 50)
    (True, False)
    """
    rows = len(labels)
    if rows < 2:
        return True
    shares = torch.bincount(labels).double() / rows
    chance = float((shares**2).sum())
    same = float((labels[1:] == labels[:-1]).double().mean())
    return same - chance <= 6 * (chance * (1 - chance) / rows) ** 0.5


def rows_for_all(labels: Tensor, rows: int) -> Tensor:
    """Return the indices of so many rows that stand for all, in rising order: all where there are not as many.

    They are the first rows, or, where rows are not in random order, a random choice, the same on every call.

    >>> rows_for_all(torch.arange(8) % 2, 3)
    tensor([0, 1, 2])
    """
    if rows >= len(labels) or in_random_order(labels):
        return torch.arange(min(rows, len(labels)))
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(np.sort(order[:rows]))
