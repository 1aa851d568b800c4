"""What a benchmark run writes: machine header, ceilings and one row per case and MID-L contender, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.files import write_json

__all__ = ["Results", "Row", "read_results", "write_results"]

VERSION = 1


@dataclass
class Row:
    """One MID-L contender in one case.

    ``times`` maps every contender to ``{"median", "q1", "q3"}`` in seconds per call; ``over_user`` and ``over_best``
    are the same three numbers of the round-by-round ratio baseline / contender. A row whose parity check is red has
    neither. ``of_read`` is that ratio for a plain read of the bytes that the contender must read: its share of the
    memory's bandwidth, measured in the same rounds. Rows of the memory cases have ``memory`` (bytes) instead.
    ``preempted`` is the share of our calls during which the scheduler took a processor away; such calls count only
    where fewer than three others were left.
    """

    case: str
    group: str
    contender: str
    params: dict[str, Any]
    implementation: str
    parity: dict[str, Any]
    user: str
    best: str | None = None
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    over_user: dict[str, float] | None = None
    over_best: dict[str, float] | None = None
    of_read: dict[str, float] | None = None
    roofline: dict[str, Any] | None = None
    memory: dict[str, dict[str, int | None]] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    preempted: float = 0.0
    copies: int = 1

    @property
    def refused(self) -> bool:
        """Whether the parity check was red, so that no speed may be told."""
        return not self.parity["ok"]


@dataclass
class Results:
    """A whole run."""

    machine: dict[str, Any]
    ceilings: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def refused(self) -> list[Row]:
        """The rows whose parity check was red."""
        return [row for row in self.rows if row.refused]

    @property
    def preempted(self) -> float:
        """The mean share of preempted calls over the timed rows: above a few percent, the machine was busy."""
        shares = [row.preempted for row in self.rows if row.times]
        return sum(shares) / len(shares) if shares else 0.0


def write_results(path: Path, results: Results) -> None:
    """Write ``results`` as JSON, atomically."""
    write_json(path, {"version": VERSION, **asdict(results)})


def read_results(path: Path) -> Results:
    """Read what :func:`write_results` wrote.

    Raises:
        MIDLError: no benchmark file, another version, or a damaged row.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MIDLError(f"read_results: path={str(path)!r}: {error}") from error
    if not isinstance(value, dict) or value.get("version") != VERSION:
        found = value.get("version") if isinstance(value, dict) else None
        raise MIDLError(f"read_results: {path.name} has version {found!r}, expected a benchmark file of {VERSION}")
    try:
        rows = [_read_row(row) for row in value["rows"]]
        return Results(value["machine"], value["ceilings"], value["settings"], rows)
    except (KeyError, TypeError) as error:
        raise MIDLError(f"read_results: {path.name} is damaged: {error}") from error


def _read_row(value: dict[str, Any]) -> Row:
    row = Row(**value)
    if "ok" not in row.parity:
        raise KeyError("parity without 'ok'")
    for name in ("over_user", "over_best", "of_read"):
        spread = getattr(row, name)
        if spread is not None and sorted(spread) != ["median", "q1", "q3"]:
            raise KeyError(f"{name} has {sorted(spread)}, expected median, q1 and q3")
        if spread is not None and row.refused:
            raise KeyError(f"{row.case} tells {name} although its parity check is red")
    return row
