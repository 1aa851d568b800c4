"""Reading the results of a sweep: a folder of runs, or the compact files that the repository keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.reproduce.latency import has_ratios
from midl.lab.reproduce.state import read_state

__all__ = ["PAPER_SETS", "ROUTES", "Results", "Run", "read_results"]

PAPER_SETS = ("mnist", "cifar10", "cifar100", "svhn", "adult", "imdb")
"""The data sets of arXiv 2505.11416, in the order of its abstract."""
ROUTES = ("scratch", "converted", "elastic", "adapted")
"""The methods that are MID-L."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished training: what it was asked for and its whole ``result.json``."""

    dataset: str
    method: str
    seed: int
    train_fraction: float
    label_noise: float
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """The finished runs of one profile, one for each data set, method, variant and seed.

    Args:
        profile: of all runs.
        runs: in the order they were read.
        latency: data set to the content of ``latency.json``.
        superseded: number of runs left out because another has the same data set, method, variant and seed.
        failed: data set to one line for each run whose last attempt failed.
    """

    profile: str
    runs: tuple[Run, ...]
    latency: dict[str, dict[str, Any]]
    superseded: int = 0
    failed: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """Data sets with at least one run, the paper's first."""
        found = {run.dataset for run in self.runs}
        return [name for name in PAPER_SETS if name in found] + sorted(found - set(PAPER_SETS))

    def methods(self, dataset: str) -> list[str]:
        """Return the methods with a run on the whole, clean training set, in the lab's order."""
        from midl.lab.methods import METHODS

        found = {run.method for run in self.runs if run.dataset == dataset and _is_plain(run)}
        return [name for name in METHODS if name in found] + sorted(found - set(METHODS))

    def seeds(self, dataset: str, method: str, fraction: float = 1.0, noise: float = 0.0) -> dict[int, dict[str, Any]]:
        """Return seed to record of a method's runs with a share of the training rows and of random labels."""
        return {
            run.seed: run.record
            for run in sorted(self.runs, key=lambda run: run.seed)
            if (run.dataset, run.method, run.train_fraction, run.label_noise) == (dataset, method, fraction, noise)
        }

    def values(self, dataset: str, method: str, field: str, **variant: float) -> dict[int, float]:
        """Return seed to one number of the records."""
        return {seed: record[field] for seed, record in self.seeds(dataset, method, **variant).items()}

    def variants(self, dataset: str) -> list[tuple[float, float]]:
        """Return (training fraction, label noise) of all runs on a data set, the plain ones first."""
        found = {(run.train_fraction, run.label_noise) for run in self.runs if run.dataset == dataset}
        return sorted(found, key=lambda variant: (variant[1], -variant[0]))

    def best_route(self, dataset: str, among: Iterable[str] = ROUTES) -> str | None:
        """Return the MID-L method of highest mean test accuracy, or None where none has run.

        Networks in which nothing is selected are low-rank ones: what they reach says nothing of MID-L.
        """
        means = {}
        for method in among:
            values = list(self.values(dataset, method, "accuracy").values())
            if values and any(self.values(dataset, method, "active_neurons").values()):
                means[method] = sum(values) / len(values)
        return max(means, key=lambda method: means[method]) if means else None


def read_results(path: Path) -> Results:
    """Return the results below a sweep's folder, or in a folder of compact files as ``midl runs --export`` writes them.

    Where there are runs of several profiles those of ``paper`` count, else those of the profile with most runs.

    Raises:
        MIDLError: there is none, or a file is damaged; the message names it.
    """
    files = sorted(path.glob("*/*/result.json"), key=lambda file: (file.stat().st_mtime, str(file)))
    compact = [] if files else sorted(path.glob("*.json"))
    records = [_load(file) for file in files]
    latency = {file.parent.name: _load(file) for file in path.glob("*/latency.json")} if files else {}
    for file in compact:
        content = _load(file)
        if isinstance(content, dict) and content.get("runs"):
            records += content["runs"]
            if "latency" in content:
                latency[content["runs"][0]["spec"]["dataset"]] = content["latency"]
    latency = {dataset: content for dataset, content in latency.items() if has_ratios(content)}
    if not records:
        raise MIDLError(f"report: {path} holds no results, expected a folder of midl reproduce or midl runs --export")
    runs = [_run(record, path) for record in records]
    profiles = [run.record["spec"].get("profile", "unknown") for run in runs]
    profile = "paper" if "paper" in profiles else max(sorted(set(profiles)), key=profiles.count)
    chosen = [run for run, name in zip(runs, profiles, strict=True) if name == profile]
    # The last one counts: of a folder, the youngest.
    unique = {(r.dataset, r.method, r.seed, r.train_fraction, r.label_noise): r for r in chosen}
    return Results(profile, tuple(unique.values()), latency, len(chosen) - len(unique), _failures(path, profile))


def _failures(path: Path, profile: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for state in map(read_state, sorted(file.parent for file in path.glob("*/*/failure.json"))):
        if state is not None and state.state == "failed" and state.spec["profile"] == profile:
            what = "tuning" if state.kind == "tuning" else f"seed {state.spec['seed']}"
            out.setdefault(state.spec["dataset"], []).append(f"{state.spec['method']}, {what}: {state.reason}")
    return out


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise MIDLError(f"report: {file} cannot be read ({error}), expected JSON") from error


def _run(record: Any, path: Path) -> Run:
    try:
        spec = record["spec"]
        float(record["accuracy"])
        return Run(
            spec["dataset"], spec["method"], spec["seed"], spec.get("train_fraction", 1.0),
            spec.get("label_noise", 0.0), record,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise MIDLError(f"report: {path} has a record without {error}, expected those of midl reproduce") from error


def _is_plain(run: Run) -> bool:
    return run.train_fraction == 1 and not run.label_noise
