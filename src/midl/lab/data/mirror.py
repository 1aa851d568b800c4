"""A local mirror: ``$MIDL_DATA/<name>/train.parquet`` and ``test.parquet``, checked before use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from midl.errors import DataError
from midl.lab.data.table import Table
from midl.lab.files import hash_file

__all__ = ["ENVIRONMENT_VARIABLE", "SPLITS", "checked_hashes", "mirror_path", "read_tables"]

ENVIRONMENT_VARIABLE = "MIDL_DATA"
SPLITS = ("train", "test")


def mirror_path() -> Path | None:
    """Return the mirror's folder, or None where ``MIDL_DATA`` is not set.

    Raises:
        DataError: it names something that is no folder.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_dir():
        raise DataError(
            f"{ENVIRONMENT_VARIABLE}={value!r} is no folder, expected one with <data set>/train.parquet and "
            "<data set>/test.parquet (unset it to download from the hub)"
        )
    return path


def checked_hashes(mirror: Path, name: str) -> dict[str, str]:
    """Return each split's SHA-256, compared with the mirror's ``SHA256SUMS`` where that lists it.

    Raises:
        DataError: a file is missing or its hash differs.
    """
    listed = _read_sums(mirror)
    hashes = {}
    for split in SPLITS:
        file = mirror / name / f"{split}.parquet"
        if not file.is_file():
            raise DataError(
                f"{file} is missing: {ENVIRONMENT_VARIABLE} names a mirror that must hold {name}/train.parquet and "
                f"{name}/test.parquet (unset {ENVIRONMENT_VARIABLE} to download from the hub)"
            )
        hashes[split] = hash_file(file)
        expected = listed.get(f"{name}/{split}.parquet")
        if expected is not None and hashes[split] != expected:
            raise DataError(
                f"{file} is corrupted: its SHA-256 is {hashes[split]}, expected {expected} "
                f"as in {mirror / 'SHA256SUMS'}"
            )
    return hashes


def read_tables(mirror: Path, name: str, scratch: Path) -> Mapping[str, Table]:
    """Read both splits through the ``datasets`` library, with ``scratch`` for its own files.

    Raises:
        DataError: a file is no readable parquet.
    """
    import datasets

    datasets.disable_progress_bars()
    tables = {}
    for split in SPLITS:
        file = mirror / name / f"{split}.parquet"
        try:
            rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(scratch))
        except Exception as error:  # datasets wraps arrow's and the file system's errors in several classes of its own
            cause = error.__cause__ or error
            raise DataError(f"{file} is corrupted: not readable as parquet ({cause})") from error
        tables[split] = Table(rows, str(file))
    return tables


def _read_sums(mirror: Path) -> dict[str, str]:
    sums = mirror / "SHA256SUMS"
    if not sums.is_file():
        return {}
    pairs = [line.split(maxsplit=1) for line in sums.read_text().splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{sums} has a line without a file's name, expected lines of sha256sum: hash and name")
    return {name.strip().removeprefix("*").removeprefix("./"): digest for digest, name in pairs}
