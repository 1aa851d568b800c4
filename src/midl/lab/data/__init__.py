"""Data sets: from a local mirror, from the hub or embedded; decoded once, then memory-mapped.

A new data set is one file in :mod:`midl.lab.data.sets` that defines ``SPEC``.
"""

from midl.lab.data.dataset import Dataset, Split, in_random_order, rows_for_all
from midl.lab.data.load import load
from midl.lab.data.registry import find, names

__all__ = ["Dataset", "Split", "find", "in_random_order", "load", "names", "rows_for_all"]
