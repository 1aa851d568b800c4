"""digits: 1,797 real 8 x 8 handwritten digits that come with scikit-learn; no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(scikit-learn ships its test set). The split is ours: a fifth of every class, fixed, for testing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from midl.lab.data.dataset import Arrays
from midl.lab.data.registry import Spec
from midl.lab.data.statistics import column_statistics
from midl.lab.data.table import Table

__all__ = ["SPEC"]

_CLASSES = 10
_TEST_FRACTION = 0.2


def _decode(tables: Mapping[str, Table]) -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.data.astype(np.float32), bunch.target.astype(np.int64)
    generator = np.random.default_rng(0)
    by_class = [generator.permutation(np.flatnonzero(y == label)) for label in range(_CLASSES)]
    cuts = [round(len(rows) * _TEST_FRACTION) for rows in by_class]
    test = np.sort(np.concatenate([rows[:cut] for rows, cut in zip(by_class, cuts, strict=True)]))
    train = np.sort(np.concatenate([rows[cut:] for rows, cut in zip(by_class, cuts, strict=True)]))
    return Arrays(x[train], y[train], x[test], y[test], *column_statistics(x[train]))


SPEC = Spec(num_classes=_CLASSES, decode=_decode)
