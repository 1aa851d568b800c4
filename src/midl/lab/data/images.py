"""Decoding of labelled image sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from midl.lab.data.dataset import Arrays
from midl.lab.data.statistics import channel_statistics
from midl.lab.data.table import Table

__all__ = ["decode_images"]


def decode_images(
    image: str, label: str, num_classes: int, mode: str, height: int, width: int
) -> Callable[[Mapping[str, Table]], Arrays]:
    """Return a ``decode`` function for tables with a column of images and one of class indices.

    Args:
        image: name of the image column.
        label: name of the label column.
        num_classes: number of classes.
        mode: Pillow's mode, ``"L"`` or ``"RGB"``.
        height: in pixels, of every image.
        width: in pixels, of every image.
    """

    def decode(tables: Mapping[str, Table]) -> Arrays:
        train_x, test_x = (tables[split].images(image, mode, height, width) for split in ("train", "test"))
        train_y, test_y = (tables[split].labels(label, num_classes) for split in ("train", "test"))
        return Arrays(train_x, train_y, test_x, test_y, *channel_statistics(train_x))

    return decode
