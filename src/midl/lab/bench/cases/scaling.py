"""How the forward pass scales: density and batch, width, group size, threads (float32)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from midl.lab.bench.cases.forward import forward_case
from midl.lab.bench.registry import Case, register

__all__: list[str] = []


@register
def cases() -> Iterator[Case]:
    """Yield one case per batch with every density in it, and one per width, group-size pair and number of threads."""
    densities = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
    for batch in (1, 4, 16, 64, 256):
        yield forward_case("scaling/density", 1024, 4096, batch, actives=densities, quick=batch == 16)
    for width in (256, 512, 2048, 8192):
        yield forward_case("scaling/width", width, width, 16)
    for batch in (1, 64):
        yield forward_case("scaling/group_size", 1024, 4096, batch, groups=(1, 2, 4, 8, 16, 32, 64, 128))
    for threads in (count for count in (1, 2, 4, 8, 16) if count <= (os.cpu_count() or 1)):
        yield forward_case("scaling/threads", 1024, 4096, 64, threads=threads)
