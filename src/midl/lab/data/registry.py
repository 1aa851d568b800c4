"""The registry: every module of :mod:`midl.lab.data.sets` is a data set and defines ``SPEC``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

from midl.errors import DataError
from midl.lab.data import sets
from midl.lab.data.dataset import Arrays, Augment
from midl.lab.data.table import Table

__all__ = ["Spec", "find", "names"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the data layer has to know of one data set.

    Args:
        num_classes: number of classes.
        decode: turns the tables ``"train"`` and ``"test"`` into arrays; gets no tables if the data is embedded.
        columns: expected columns of both tables; empty if the data comes embedded with an installed package.
        download: fetches the official splits where no mirror is set; gets a scratch folder that is deleted later.
        origin: where ``download`` gets them, for messages.
        augment: changes stored training rows at random, from torch's generator; ``None``: training sees them as stored.
    """

    num_classes: int
    decode: Callable[[Mapping[str, Table]], Arrays]
    columns: tuple[str, ...] = ()
    download: Callable[[Path], Mapping[str, Table]] | None = None
    origin: str = "embedded"
    augment: Augment | None = None


def names() -> list[str]:
    """Return the known data sets.

    >>> "digits" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(sets.__path__))


def find(name: str) -> Spec:
    """Return the specification of a data set.

    Raises:
        DataError: unknown name; the message lists the known ones.
    """
    if name not in names():
        raise DataError(f"dataset={name!r} is unknown, expected one of {names()}")
    return importlib.import_module(f"{sets.__name__}.{name}").SPEC
