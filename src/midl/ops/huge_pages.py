"""Memory in huge pages: for panels, since every call streams them, and with pages of 4 KiB much of that is page walks;
and for outputs and gradients so large that they lie in fresh memory every time, one page fault per page.

Linux gives an allocation huge pages where its owner asks for them (``madvise``), which neither malloc nor torch does by
itself. Elsewhere, and for less memory than one such page, this is :func:`torch.empty`.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["empty", "empty_where_mapped", "page_size"]

# glibc's malloc maps fresh memory for every allocation of this size and unmaps it when it is freed; of smaller ones it
# learns to keep the memory.
_ALWAYS_MAPPED = 32 * 2**20

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


@functools.cache
def page_size() -> int:
    """Return the size of a huge page in bytes, 0 where there are none for the asking.

    >>> page_size() % 4096
    0
    """
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        size = int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if hasattr(mmap, "MADV_HUGEPAGE") and size > 0 and size % mmap.PAGESIZE == 0 else 0


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor of ``count`` elements of undefined value, in huge pages as far as it fills whole ones.

    >>> empty(10, torch.float32).shape
    torch.Size([10])

    Args:
        count: of elements.
        dtype: theirs.
    """
    page, size = page_size(), count * dtype.itemsize
    if page == 0 or size < page:
        return torch.empty(count, dtype=dtype, device="cpu")
    try:
        # A page more, so that it can begin where one begins; what is never touched takes no memory.
        memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % page
        memory.madvise(mmap.MADV_HUGEPAGE, offset, size // page * page)
    except OSError:
        return torch.empty(count, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def empty_where_mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor of undefined value that is not kept: in huge pages if it is so large that malloc maps it.

    The gradient of a weight of 64 MiB is 16384 page faults otherwise, in every training step, which take as long as to
    compute it.

    >>> empty_where_mapped((2, 3), torch.float32).shape
    torch.Size([2, 3])

    Args:
        shape: of the tensor.
        dtype: of its elements.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < _ALWAYS_MAPPED:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return empty(count, dtype).view(shape)
