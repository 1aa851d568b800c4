"""The registry: every benchmark case has a name, a group and a function that measures it."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from midl.errors import MIDLError
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session

__all__ = ["Case", "all_cases", "register", "select_cases"]

# One module per subject; each registers a function that lists its cases.
_MODULES = (
    "forward", "efficiency", "training", "selection", "convolution", "convolution_training", "ffn", "scaling",
    "overhead", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One benchmark: ``measure(session, case)`` returns a row per MID-L contender.

    Args:
        group: the rows that a geometric mean is taken over, such as ``forward/float32``.
        size: the rest of the name, such as ``1024x4096/batch8``.
        measure: runs the case.
        quick: whether ``--quick`` includes it.
        params: shape and choices, as they go into the JSON.
    """

    group: str
    size: str
    measure: Callable[[Session, Case], list[Row]]
    quick: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``group/size``; what ``--only`` matches."""
        return f"{self.group}/{self.size}"


_sources: list[Callable[[], Iterator[Case]]] = []


def register(source: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
    """Add a function that yields cases (decorator)."""
    _sources.append(source)
    return source


def all_cases() -> list[Case]:
    """Return every registered case.

    >>> len({case.name for case in all_cases()}) == len(all_cases())
    True
    """
    for module in _MODULES:
        importlib.import_module(f"midl.lab.bench.cases.{module}")
    return [case for source in _sources for case in source()]


def select_cases(only: str | None = None, *, quick: bool = False) -> list[Case]:
    """Return the cases to run.

    >>> [case.name for case in select_cases("overhead")]
    ['overhead/256x256/batch1']

    Args:
        only: a name, else a shell pattern or a part of names; commas separate several.
        quick: the short list alone.

    Raises:
        MIDLError: nothing matches.
    """
    cases = [case for case in all_cases() if case.quick or not quick]
    if only:
        names = [case.name for case in cases]
        wanted = {name for pattern in only.split(",") for name in _matching(pattern.strip(), names)}
        cases = [case for case in cases if case.name in wanted]
    if not cases:
        groups = sorted({case.group for case in all_cases()})
        raise MIDLError(f"bench: only={only!r}, quick={quick} matches no case, expected part of a name in {groups}")
    return cases


def _matching(pattern: str, names: list[str]) -> list[str]:
    if not pattern or pattern in names:
        return [pattern]
    return [name for name in names if pattern in name or fnmatch.fnmatchcase(name, pattern)]
