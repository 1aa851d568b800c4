"""Call overhead of a small layer: everything is in the cache, the time is Python, dispatch and launch."""

from __future__ import annotations

from collections.abc import Iterator

from midl.lab.bench.cases.forward import forward_case
from midl.lab.bench.registry import Case, register

__all__: list[str] = []


@register
def cases() -> Iterator[Case]:
    """Yield the layer of 256 by 256 at batch 1."""
    yield forward_case("overhead", 256, 256, 1, groups=(1, 16, 32), hot_calls=50, quick=True)
