"""Standardisation statistics; callers give them training rows alone."""

from __future__ import annotations

import numpy as np

__all__ = ["channel_statistics", "column_statistics"]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every channel of (rows, channels, height, width), as (channels, 1, 1)."""
    # Chunks: a float64 copy of a whole image set would take gigabytes.
    total = np.zeros(images.shape[1])
    squares = np.zeros(images.shape[1])
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096].astype(np.float64)
        total += chunk.sum((0, 2, 3))
        squares += (chunk**2).sum((0, 2, 3))
    count = images.size / images.shape[1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(_as_row(v)[:, None, None] for v in (mean, _positive(std)))  # type: ignore[return-value]


def column_statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every column of (rows, columns), as (columns,)."""
    wide = rows.astype(np.float64)
    return _as_row(wide.mean(0)), _as_row(_positive(wide.std(0)))


def _positive(std: np.ndarray) -> np.ndarray:
    """Constant columns carry no information: dividing them by one keeps them finite."""
    return np.where(std > 0, std, 1.0)


def _as_row(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)
