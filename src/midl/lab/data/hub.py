"""Downloading a data set's official splits from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from midl.lab.data.mirror import SPLITS
from midl.lab.data.table import Table

__all__ = ["from_hub"]


def from_hub(repository: str, configuration: str | None = None) -> Callable[[Path], Mapping[str, Table]]:
    """Return a ``download`` function for a hub data set with splits named ``train`` and ``test``.

    Args:
        repository: ``owner/name`` on the hub.
        configuration: where the repository has several.
    """

    def download(scratch: Path) -> Mapping[str, Table]:
        import datasets

        return {
            split: Table(
                datasets.load_dataset(repository, configuration, split=split, cache_dir=str(scratch)),
                f"hub data set {repository} ({split})",
            )
            for split in SPLITS
        }

    return download
