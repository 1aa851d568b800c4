"""Dataset: the rows of a train and a test split and the training statistics that standardise both."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor

from midl.errors import DataError

__all__ = ["Arrays", "Dataset", "Split"]


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A decoded data set as stored in the cache.

    Args:
        train_x: (rows, ...) uint8 or float32.
        train_y: (rows,) int64 class indices.
        test_x: like ``train_x``.
        test_y: like ``train_y``.
        mean: of the training rows, broadcastable to one row.
        std: of the training rows, above 0, broadcastable to one row.
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
        mean: standardisation, from training rows alone.
        std: likewise.
        fingerprint: hash of all rows, labels and statistics.
    """

    name: str
    num_classes: int
    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    fingerprint: str

    @classmethod
    def from_arrays(cls, name: str, num_classes: int, arrays: Arrays) -> Dataset:
        """Wrap decoded arrays without copying them."""
        t = {f.name: torch.from_numpy(getattr(arrays, f.name)) for f in dataclasses.fields(Arrays)}
        return cls(
            name, num_classes, Split(t["train_x"], t["train_y"]), Split(t["test_x"], t["test_y"]), t["mean"],
            t["std"], arrays.fingerprint(),
        )  # fmt: skip

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input row."""
        return tuple(self.train.x.shape[1:])

    def batch(self, split: Split, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return standardised inputs, float32, and labels of the chosen rows of ``split``."""
        return (split.x[rows].float() - self.mean) / self.std, split.y[rows]

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
