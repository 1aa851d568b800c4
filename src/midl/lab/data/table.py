"""Table: the raw rows of one split with the name of where they came from, and checked access to columns."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np

from midl.errors import DataError

__all__ = ["Table"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one split.

    Args:
        rows: a ``datasets.Dataset``.
        origin: file or address, for messages.
    """

    rows: Any
    origin: str

    def check_columns(self, expected: tuple[str, ...]) -> None:
        """Raise DataError unless every expected column is there and there is at least one row."""
        missing = [name for name in expected if name not in self.rows.column_names]
        if missing:
            raise DataError(
                f"{self.origin}: columns {missing} are missing (found {list(self.rows.column_names)}), "
                f"expected {list(expected)}"
            )
        if not len(self.rows):
            raise DataError(f"{self.origin}: no rows, expected at least one")

    def labels(self, column: str, num_classes: int) -> np.ndarray:
        """Return class indices, (rows,) int64.

        Raises:
            DataError: a value is no integer in [0, num_classes); the message names the row.
        """
        values = self.integers(column)
        bad = np.flatnonzero((values < 0) | (values >= num_classes))
        if len(bad):
            raise DataError(
                f"{self.origin}: row {bad[0]} has {column}={values[bad[0]]}, expected a class "
                f"from 0 to {num_classes - 1}"
            )
        return values

    def integers(self, column: str) -> np.ndarray:
        """Return a column of integers, (rows,) int64."""
        return np.array(self._checked(column, int, "an integer"), dtype=np.int64)

    def strings(self, column: str) -> list[str]:
        """Return a column of strings."""
        return self._checked(column, str, "a string")

    def images(self, column: str, mode: str, height: int, width: int) -> np.ndarray:
        """Decode a column of images to (rows, channels, height, width) uint8.

        Args:
            column: holds encoded images, as the hub's Image feature stores them.
            mode: Pillow's mode, ``"L"`` (1 channel) or ``"RGB"`` (3 channels).
            height: expected of every image.
            width: expected of every image.

        Raises:
            DataError: a row holds no image or one of another size; the message names the row.
        """
        import datasets
        from PIL import Image, UnidentifiedImageError

        channels = len(mode)
        out = np.empty((len(self.rows), channels, height, width), dtype=np.uint8)
        encoded = self._column(column, datasets.Image(decode=False))
        for row, cell in enumerate(encoded):
            try:
                image = Image.open(io.BytesIO(cell["bytes"])).convert(mode)
            except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
                raise DataError(f"{self.origin}: row {row} of {column!r} is no readable image ({error})") from error
            if image.size != (width, height):
                raise DataError(
                    f"{self.origin}: row {row} of {column!r} is {image.size[1]} x {image.size[0]} pixels, "
                    f"expected {height} x {width}"
                )
            out[row] = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
        return out

    def _column(self, column: str, feature: Any) -> Any:
        try:
            return self.rows.select_columns([column]).cast_column(column, feature)[column][:]
        except (TypeError, ValueError, NotImplementedError) as error:
            raise DataError(
                f"{self.origin}: column {column!r} is {self.rows.features[column]}, expected encoded images"
            ) from error

    def _checked(self, column: str, kind: type, expected: str) -> list[Any]:
        values = list(self.rows[column][:])  # at once; iterating over datasets' lazy column reads row by row
        for row, value in enumerate(values):
            if not isinstance(value, kind):
                raise DataError(f"{self.origin}: row {row} has {column}={value!r}, expected {expected}")
        return values
