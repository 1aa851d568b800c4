"""The runs below a folder and how each stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.reproduce.state import State, read_state

__all__ = ["list_runs"]


def list_runs(runs: Path) -> list[State]:
    """Return the state of every run below ``runs``, by data set, method, variant and seed.

    Raises:
        MIDLError: there is none.
    """
    states = [state for file in runs.glob("*/*/run.json") if (state := read_state(file.parent)) is not None]
    if not states:
        raise MIDLError(f"runs={str(runs)!r} holds no runs, expected the folder that midl reproduce wrote to")
    return sorted(states, key=_order)


def _order(state: State) -> tuple[Any, ...]:
    spec = state.spec
    variant = (-spec.get("train_fraction", 1.0), spec.get("label_noise", 0.0), spec.get("seed", -1))
    return (spec["dataset"], spec["profile"], spec["method"], state.kind != "tuning", *variant, state.folder.name)
