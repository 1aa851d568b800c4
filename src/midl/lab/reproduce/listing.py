"""The runs below a folder: how each stands, as a table and as compact JSON for the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.files import write_text
from midl.lab.reproduce.latency import latency_of, of_runs
from midl.lab.reproduce.state import State, describe_failure, newest, read_state

__all__ = ["export", "list_runs"]

# What the committed results leave out, because it is large or says nothing away from its machine.
_BULKY = ("losses", "measure_seconds")
_PICTURES = ("activity", "gate")


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


def export(runs: Path, out: Path) -> list[Path]:
    """Write the finished runs as one JSON file per data set and profile and return the files.

    One line per run, in an order that does not depend on when they ran, without what is bulky: losses of every epoch,
    measures of the overfitting study's runs, activity and gates of all seeds but the first. Runs that a younger one of
    the same data set, method, variant and seed supersedes stay behind, failures and latencies go along.
    """
    states = list_runs(runs)
    entries: dict[str, list[dict[str, Any]]] = {}
    folders: dict[str, set[str]] = {}
    for state in sorted(newest(states), key=_order):
        name = _file_of(state)
        assert state.finished is not None  # of newest
        entries.setdefault(name, []).append(_compact(state.finished, entries.get(name, [])))
        folders.setdefault(name, set()).add(state.folder.name)
    failures: dict[str, list[str]] = {}
    for state in states:
        if state.state == "failed":
            failures.setdefault(_file_of(state), []).append(describe_failure(state))
    files = []
    for name, results in entries.items():
        latency = of_runs(latency_of(runs / results[0]["spec"]["dataset"]), folders[name])
        parts = [f'"runs": [\n{_lines(results)}\n]']
        if name in failures:
            parts.append(f'"failed": {json.dumps(failures[name])}')
        if latency is not None:
            parts.append(f'"latency": {json.dumps(latency, sort_keys=True)}')
        files.append(out / f"{name}.json")
        write_text(files[-1], "{\n" + ",\n".join(parts) + "\n}\n")
    return files


def _file_of(state: State) -> str:
    return state.spec["dataset"] + ("" if state.spec["profile"] == "paper" else f"-{state.spec['profile']}")


def _compact(result: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a result without what is large: of a method's maps and histograms the first run's will do."""
    spec = result["spec"]
    kept = {key: value for key, value in result.items() if key not in _BULKY}
    kept["final_loss"] = result["losses"][-1]
    if spec["train_fraction"] < 1 or spec["label_noise"]:
        kept["measures"] = {}
    elif any(other["spec"]["method"] == spec["method"] for other in before):
        kept["measures"] = {name: value for name, value in result["measures"].items() if name not in _PICTURES}
    return kept


def _lines(results: list[dict[str, Any]]) -> str:
    return ",\n".join(json.dumps(result, sort_keys=True) for result in results)
