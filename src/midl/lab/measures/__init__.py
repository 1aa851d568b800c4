"""What the lab asks a trained model beside its accuracy; one module per measure, all JSON values.

A new measure is one function ``(model, dataset) -> dict`` in a module of its own, and one line in ``MEASURES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from midl.errors import MIDLError
from midl.lab.data import Dataset
from midl.lab.measures.activity import measure_activity
from midl.lab.measures.gate import measure_gates
from midl.lab.measures.robustness import measure_robustness
from midl.lab.measures.smi import measure_smi

__all__ = ["MEASURES", "measure_all"]

MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "activity": measure_activity,
    "gate": measure_gates,
    "robustness": measure_robustness,
    "smi": measure_smi,
}
"""By name; each takes ``rows``, the number of test rows to look at."""


def measure_all(
    model: nn.Module, dataset: Dataset, *, rows: int | None = None, names: Sequence[str] = tuple(MEASURES)
) -> dict[str, Any]:
    """Return every measure of a trained model on a data set's test rows, by name, as JSON values.

    The model is left as it was, random generators too; a model without MID-L layers has empty activity, gate and SMI.

    Args:
        model: takes the data set's inputs and returns logits.
        dataset: its test rows are used.
        rows: test rows for each measure; ``None`` for each measure's own choice.
        names: which measures.

    Raises:
        MIDLError: an unknown measure, or ``rows`` below 1.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise MIDLError(f"measure_all: names={list(names)!r} has {unknown}, expected some of {list(MEASURES)}")
    if rows is not None and rows < 1:
        raise MIDLError(f"measure_all: rows={rows!r}, expected at least 1")
    sizes = {} if rows is None else {"rows": rows}
    return {name: MEASURES[name](model, dataset, **sizes) for name in names}
