"""Mutual information between one continuous number and a class: a k-nearest-neighbour estimate."""

from __future__ import annotations

import numpy as np
from scipy.special import digamma

from midl.errors import MIDLError

__all__ = ["estimate_mutual_information"]


def estimate_mutual_information(
    values: np.ndarray, labels: np.ndarray, neighbours: int = 3, seed: int = 0
) -> np.ndarray:
    """Return the mutual information of every column of ``values`` with the labels, in nats, float64 (columns,).

    >>> generator = np.random.default_rng(0)
    >>> labels = generator.integers(0, 2, 1000)
    >>> values = np.stack([generator.normal(size=1000), labels + 0.01 * generator.normal(size=1000)], axis=1)
    >>> estimate_mutual_information(values, labels).round(1).tolist()  # independent; known: log 2
    [0.0, 0.7]

    The estimate is that of scikit-learn's ``mutual_info_classif``, to which tests compare it; on single columns sorting
    makes it some thirty times faster. It is not clipped at zero, so that averages of it have no bias near independence.

    Args:
        values: (rows, columns). Equal values are set apart by noise of 1e-10 of the scale.
        labels: (rows,), integers. Classes of a single row say nothing and are left out.
        neighbours: per row within its class; fewer in classes with fewer rows.
        seed: of the noise.

    Raises:
        MIDLError: fewer than two rows in every class, or values that are not finite.

    Source: B. C. Ross, "Mutual information between discrete and continuous data sets", PLoS ONE 9(2), 2014.
    """
    if not np.isfinite(values).all():
        raise MIDLError("estimate_mutual_information: values has NaN or infinity, expected finite numbers")
    classes, counts = np.unique(labels, return_counts=True)
    kept = np.isin(labels, classes[counts > 1])
    if not kept.any():
        raise MIDLError("estimate_mutual_information: labels has no class of two rows or more")
    x, y = values[kept].astype(np.float64), labels[kept]
    scale = x.std(0)
    x = x / np.where(scale > 0, scale, 1.0)
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    x = x + 1e-10 * np.maximum(1, np.abs(x).mean(0)) * noise
    rows, columns = x.shape
    ordered, radii, constant = [], [], float(digamma(rows))
    for label in classes[counts > 1]:
        own = np.sort(x[y == label], axis=0)
        k = min(neighbours, len(own) - 1)
        ordered.append(own)
        radii.append(_distance_of_neighbour(own, k))
        constant += len(own) / rows * float(digamma(k) - digamma(len(own)))
    centre, radius = np.concatenate(ordered), np.concatenate(radii)
    # The k-th neighbour itself is not counted: stay inside its distance by more than the sums below round.
    radius -= 4 * np.spacing(np.abs(centre) + radius)
    everything = np.sort(x, axis=0)
    inside = np.empty(x.shape, dtype=np.int64)
    for i in range(columns):
        after = np.searchsorted(everything[:, i], centre[:, i] + radius[:, i], side="right")
        inside[:, i] = after - np.searchsorted(everything[:, i], centre[:, i] - radius[:, i], side="left")
    return constant - digamma(inside).mean(0)


def _distance_of_neighbour(ordered: np.ndarray, k: int) -> np.ndarray:
    """Return the distance of every entry to its k-th nearest in its column; columns are in ascending order."""
    rows = len(ordered)
    best = np.full(ordered.shape, np.inf)
    # The k nearest and the entry itself are neighbours in order: one of the k + 1 windows around it.
    for before in range(k + 1):
        after = k - before
        inner = slice(before, rows - after)
        reach = np.maximum(ordered[inner] - ordered[: rows - k], ordered[k:] - ordered[inner])
        best[inner] = np.minimum(best[inner], reach)
    return best
