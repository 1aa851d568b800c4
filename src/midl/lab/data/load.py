"""Loading: cache, mirror or download, in that order of cost."""

from __future__ import annotations

import importlib
from pathlib import Path

from midl.errors import DataError
from midl.lab.data import mirror, sets
from midl.lab.data.cache import read_arrays, scratch_folder, write_arrays
from midl.lab.data.dataset import Arrays, Dataset
from midl.lab.data.registry import Spec, find
from midl.lab.files import hash_file, hash_json

__all__ = ["load"]

_DECODING = ("midl.lab.data.table", "midl.lab.data.images", "midl.lab.data.statistics")


def load(name: str) -> Dataset:
    """Return a data set by name.

    ``digits`` comes with scikit-learn. The others are read from the mirror that the environment variable ``MIDL_DATA``
    names, or downloaded where it is not set; what was decoded once is memory-mapped from the cache (``MIDL_CACHE``).

    >>> digits = load("digits")
    >>> digits.input_shape, digits.num_classes
    ((64,), 10)

    Raises:
        DataError: unknown name, a file that is missing or damaged, or a cache that cannot be used.
    """
    spec = find(name)
    if not spec.columns:
        return Dataset.from_arrays(name, spec.num_classes, spec.decode({}), spec.augment)
    source = mirror.mirror_path()
    content = mirror.checked_hashes(source, name) if source else spec.origin
    # What was decoded by other code is decoded anew.
    code = [_code_hash(module) for module in (f"{sets.__name__}.{name}", *_DECODING)]
    key = f"{name}-{hash_json([name, content, code])[:16]}"
    arrays = read_arrays(key)
    if arrays is None:
        write_arrays(key, _decode(name, spec, source))
        arrays = read_arrays(key)
        if arrays is None:
            raise DataError(f"dataset={name!r}: the cache entry {key} was damaged while it was written")
    return Dataset.from_arrays(name, spec.num_classes, arrays, spec.augment)


def _decode(name: str, spec: Spec, source: Path | None) -> Arrays:
    with scratch_folder() as scratch:
        if source is not None:
            tables = mirror.read_tables(source, name, Path(scratch))
        else:
            assert spec.download is not None
            try:
                tables = spec.download(Path(scratch))
            except DataError:
                raise
            except Exception as error:  # network, hub and file-system errors come from many libraries
                raise DataError(
                    f"dataset={name!r}: the download from {spec.origin} failed ({type(error).__name__}: {error}); "
                    f"expected network access, or {mirror.ENVIRONMENT_VARIABLE} naming a folder with "
                    f"{name}/train.parquet and {name}/test.parquet"
                ) from error
        for table in tables.values():
            table.check_columns(spec.columns)
        return spec.decode(tables)


def _code_hash(module: str) -> str:
    file = importlib.import_module(module).__file__
    assert file is not None
    return hash_file(Path(file))
