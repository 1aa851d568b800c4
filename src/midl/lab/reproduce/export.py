"""The finished runs of a sweep as compact JSON for the repository, added to what an earlier export left there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.files import read_json, write_text
from midl.lab.reproduce.latency import join, latency_of, of_runs
from midl.lab.reproduce.listing import list_runs
from midl.lab.reproduce.state import State, describe_failure, newest, read_finished
from midl.lab.training import Recipe

__all__ = ["export"]

# What the committed results leave out, because it is large or says nothing away from its machine.
_BULKY = ("losses", "measure_seconds")
_PICTURES = ("activity", "gate")


def export(runs: Path, out: Path) -> list[Path]:
    """Write the finished runs as one JSON file per data set and profile and return the files.

    One line per run, in an order that does not depend on when they ran, without what is bulky: losses of every epoch,
    measures of the overfitting study's runs, activity and gates of all seeds but the first. Runs that a younger one of
    the same data set, method, variant and seed supersedes stay behind; failures, latencies and the tunings that the
    runs took their hyperparameters from go along.

    What a file holds already stays where the folder has nothing in its place, so that a sweep can be extended from
    another machine: runs of other methods, variants and seeds, their tunings, and their latencies with the machine that
    timed them.

    Raises:
        MIDLError: a file is damaged, or holds runs of another network or recipe.
    """
    found: dict[str, list[State]] = {}
    for state in list_runs(runs):
        spec = state.spec
        name = spec["dataset"] + ("" if spec["profile"] == "paper" else f"-{spec['profile']}")
        found.setdefault(name, []).append(state)
    files = []
    for name, states in found.items():
        trained = newest(states)
        if trained:
            file = out / f"{name}.json"
            earlier = _read(file)
            write_text(file, _to_text(_join(_Content.of_folder(runs, states, trained), earlier, file)))
            files.append(file)
    return files


@dataclasses.dataclass(frozen=True)
class _Content:
    """What a file holds.

    Args:
        runs: results of the finished ones.
        tunings: with every point of the grid and its score.
        failed: a line for each failure.
        latency: as ``latency.json``.
        done: beginnings of the failure lines that do not count any more.
        folders: of the runs.
    """

    runs: list[dict[str, Any]]
    tunings: list[dict[str, Any]]
    failed: list[str]
    latency: dict[str, Any] | None
    done: Container[str] = ()
    folders: Container[str] = ()

    @classmethod
    def of_folder(cls, runs: Path, states: list[State], trained: list[State]) -> _Content:
        """Take what a sweep's folder says of one data set and profile."""
        names = {state.folder.name for state in trained}
        failed = [describe_failure(state) for state in states if state.state == "failed"]
        tried = [state for state in states if state.state in ("done", "failed")]
        return cls(
            runs=[_compact(state) for state in trained],
            tunings=_tunings_of(trained),
            failed=failed,
            latency=of_runs(latency_of(runs / trained[0].spec["dataset"]), names),
            done={_task_of(describe_failure(state)) for state in tried},
            folders=names,
        )


def _read(file: Path) -> _Content:
    """Return what an earlier export wrote, by any version; nothing where there is no file."""
    if not file.exists():
        return _Content([], [], [], None)
    content = read_json(file)
    try:
        for run in content["runs"]:
            _key(run)
        latency = of_runs(content.get("latency"), None)
        return _Content(content["runs"], content.get("tunings", []), content.get("failed", []), latency)
    except (AttributeError, KeyError, TypeError) as error:
        raise MIDLError(f"export: {file} is damaged (no {error}), expected what midl runs --export wrote") from error


def _join(new: _Content, old: _Content, file: Path) -> _Content:
    """Return ``new`` with what of ``old`` it does not supersede."""
    superseded = {_key(run) for run in new.runs}
    kept = [run for run in old.runs if _key(run) not in superseded]
    _check_comparable(kept, new.runs, file)
    tunings = {_tuning_key(tuning): tuning for tuning in new.tunings}
    used = {_tuning_key(run) for run in kept}
    for tuning in old.tunings:
        if _tuning_key(tuning) in used:
            tunings.setdefault(_tuning_key(tuning), tuning)
    failed = new.failed + [line for line in old.failed if _task_of(line) not in new.done]

    def is_valid(method: str, run: str) -> bool:
        """Return whether the network that was timed is still the one whose run the file holds."""
        seed = re.search(r"-s(\d+)-", run)
        plain = {key[-2] for key in superseded if key[:3] == (method, -1.0, 0.0)}
        return run in new.folders or seed is None or int(seed[1]) not in plain

    return _Content(
        runs=_without_repeated_pictures(sorted([*new.runs, *kept], key=_key)),
        tunings=[tunings[key] for key in sorted(tunings)],
        failed=sorted(failed),
        latency=join(new.latency, old.latency, is_valid),
    )


def _check_comparable(kept: list[dict[str, Any]], new: list[dict[str, Any]], file: Path) -> None:
    """Raise where runs that would stay are of another network than those that come, or of the same method with another
    recipe: side by side in one file they would be taken for seeds of one experiment.
    """
    networks = {_network(run) for run in new}
    recipes: dict[tuple[Any, ...], set[str]] = {}
    for run in new:
        recipes.setdefault(_key(run)[:3], set()).add(_recipe(run))
    for run in kept:
        found = _recipe(run)
        other = None if _network(run) in networks else "network or version of the results"
        if found not in recipes.get(_key(run)[:3], {found}):
            other = "recipe"
        if other is not None:
            raise MIDLError(
                f"export: {file} holds runs of {run['spec']['method']} with another {other}, expected that of the runs "
                "to be added: export to another folder, or remove the file"
            )


def _network(run: dict[str, Any]) -> str:
    return json.dumps([run.get("version"), run["spec"].get("architecture")], sort_keys=True)


def _recipe(run: dict[str, Any]) -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}
    return json.dumps({**defaults, **run["spec"].get("recipe", {}), "precision": None}, sort_keys=True)


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return what only one run of a file has; also the order of the runs in it."""
    spec = run["spec"]
    variant = -spec.get("train_fraction", 1.0), spec.get("label_noise", 0.0)
    return (spec["method"], *variant, spec["seed"], _precision(spec))


def _tuning_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return the method of a tuning or of a run, how it trains, and what was chosen for it."""
    spec = entry["spec"]
    tuned = entry.get("tuned") or spec.get("tuned", {})
    return spec["method"], _precision(spec), tuned.get("lr", 0.0), tuned.get("weight_decay", 0.0)


def _precision(spec: dict[str, Any]) -> str:
    return spec.get("recipe", {}).get("precision", "no")


def _task_of(failure: str) -> str:
    return failure.partition(": ")[0]


def _compact(state: State) -> dict[str, Any]:
    """Return the result of a finished run without what is large."""
    assert state.finished is not None  # of newest
    result = {key: value for key, value in state.finished.items() if key not in _BULKY}
    result["final_loss"] = state.finished["losses"][-1]
    if state.spec["train_fraction"] < 1 or state.spec["label_noise"]:
        result["measures"] = {}
    return result


def _tunings_of(trained: Iterable[State]) -> list[dict[str, Any]]:
    """Return the tunings that the runs took their learning rate and weight decay from, as far as they are there."""
    found = {}
    for state in trained:
        for name in read_json(state.folder / "run.json").get("needs", [])[:1]:
            folder = state.folder.parents[1] / name
            tuned = read_finished(folder, "tuning")
            if tuned is not None:
                found[name] = {**tuned, "grid": read_json(folder / "run.json")["settings"]["grid"]}
    return list(found.values())


def _without_repeated_pictures(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave a method's maps and histograms to the first of its runs that has them."""
    out = []
    shown: set[str] = set()
    for run in runs:
        method, measures = run["spec"]["method"], run["measures"]
        if method in shown:
            measures = {name: value for name, value in measures.items() if name not in _PICTURES}
        elif any(name in measures for name in _PICTURES):
            shown.add(method)
        out.append({**run, "measures": measures})
    return out


def _to_text(content: _Content) -> str:
    parts = [f'"runs": {_to_lines(content.runs)}']
    if content.tunings:
        parts.append(f'"tunings": {_to_lines(content.tunings)}')
    if content.failed:
        parts.append(f'"failed": {json.dumps(content.failed)}')
    if content.latency is not None:
        parts.append(f'"latency": {json.dumps(content.latency, sort_keys=True)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _to_lines(entries: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(entry, sort_keys=True) for entry in entries) + "\n]"
