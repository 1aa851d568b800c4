"""The ways to spend a network's FLOPs that the experiments set side by side: one small file each."""

from midl.errors import MIDLError
from midl.lab.methods import (
    adapted,
    converted,
    dense,
    distilled,
    distilled_long,
    dropout,
    elastic,
    gated,
    gated_long,
    k_winners,
    low_rank,
    magnitude,
    narrow,
    narrow_distilled,
    scratch,
)
from midl.lab.methods.method import NETWORK_RATIO, Budget, Method, count_neurons, load

__all__ = ["METHODS", "NETWORK_RATIO", "Budget", "Method", "count_neurons", "find", "load"]

_MODULES = (
    dense, distilled, distilled_long, dropout, narrow, narrow_distilled, low_rank, magnitude, k_winners, scratch,
    converted, elastic, adapted, gated, gated_long,
)  # fmt: skip
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}


def find(name: str) -> Method:
    """Return a method by name.

    >>> find("scratch").title
    'MID-L scratch'

    Raises:
        MIDLError: unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise MIDLError(f"method={name!r} is unknown, expected one of {list(METHODS)}")
    return METHODS[name]
