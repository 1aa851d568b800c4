"""Reading the results of a sweep: a folder of runs, or the compact files that the repository keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.files import read_json
from midl.lab.reproduce.latency import latency_of, of_runs, timed_on
from midl.lab.reproduce.profiles import PROFILES
from midl.lab.reproduce.state import describe_failure, read_state

__all__ = ["PAPER_SETS", "ROUTES", "Results", "Run", "read_results"]

PAPER_SETS = ("mnist", "cifar10", "cifar100", "svhn", "adult", "imdb")
"""The data sets of arXiv 2505.11416, in the order of its abstract."""
ROUTES = ("scratch", "converted", "elastic", "adapted", "gated", "gated_long")
"""The methods that are MID-L."""


_NUMBERS = (
    "accuracy", "train_accuracy", "active_neurons", "neurons", "flops", "dense_flops", "parameters", "weight_bytes",
    "saved_bytes", "peak_bytes", "seconds",
)  # fmt: skip


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
        precision: of their training, as accelerate names it; None: the profile's own for each data set.
        superseded: number of runs left out, because a younger one has the same data set, method, variant and seed, or
            for their precision.
        failed: data set to one line for each run whose last attempt failed.
    """

    profile: str
    runs: tuple[Run, ...]
    latency: dict[str, dict[str, Any]]
    precision: str | None = None
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

    def place_of_dense(self, dataset: str) -> dict[str, Any] | None:
        """Return machine, kernels and threads that timed the dense network, else the first one; None without timings.

        Times of other methods may be of another machine; only those of this one can be set side by side.
        """
        latency = self.latency.get(dataset)
        if latency is None:
            return None
        return timed_on(latency, "dense" if "dense" in latency["methods"] else next(iter(latency["methods"])))

    def best_route(self, dataset: str, among: Iterable[str] = ROUTES) -> str | None:
        """Return the MID-L method of highest mean test accuracy, or None where none has run.

        A network without a MID-L layer that selects, of any seed, makes no route: its layers have their light path
        alone or are dense, and what it reaches says nothing of MID-L.
        """
        means = {}
        for method in among:
            records = self.seeds(dataset, method).values()
            if records and all(_selects(record) for record in records):
                means[method] = sum(record["accuracy"] for record in records) / len(records)
        return max(means, key=lambda method: means[method]) if means else None


def read_results(path: Path) -> Results:
    """Return the results below a sweep's folder, or in a folder of compact files as ``midl runs --export`` writes them.

    Where there are runs of several profiles those of ``paper`` count, else those of the profile with most runs; where
    there are runs of several precisions on a data set those of the precision with most runs there.

    Raises:
        MIDLError: there is none, or a file is damaged; the message names it.
    """
    sources = _read_folder(path) or _read_compact(path)
    records = [record for source in sources for record in source.records]
    if not records:
        raise MIDLError(f"report: {path} holds no results, expected a folder of midl reproduce or midl runs --export")
    runs = [_run(record, path) for record in records]
    profiles = [run.record["spec"].get("profile", "unknown") for run in runs]
    profile = "paper" if "paper" in profiles else _most_frequent(profiles)
    chosen = [run for run, name in zip(runs, profiles, strict=True) if name == profile]
    # The last one counts: of a folder, the youngest.
    unique = {(r.dataset, r.method, r.seed, r.train_fraction, r.label_noise, _precision(r.record)): r for r in chosen}
    precisions = {
        dataset: _most_frequent([_precision(r.record) for r in unique.values() if r.dataset == dataset])
        for dataset in {r.dataset for r in unique.values()}
    }
    kept = [run for run in unique.values() if _precision(run.record) == precisions[run.dataset]]
    latency, failed = {}, {}
    for source in sources:
        if source.profile != profile:
            continue
        failed[source.dataset] = source.failed
        counted = {id(run.record) for run in kept}
        names = {name for name, record in source.names.items() if id(record) in counted}
        timed = of_runs(source.latency, names) if source.names else source.latency
        if timed is not None:
            latency[source.dataset] = timed
    return Results(profile, tuple(kept), latency, _unusual(profile, precisions), len(chosen) - len(kept), failed)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The runs of one data set and profile, with what else is known of them.

    Args:
        dataset: its name.
        profile: of the runs.
        records: of the finished ones, the youngest last.
        latency: timings of their networks.
        failed: a line for each one that failed.
        names: folder to record; empty where folders are not known, and all timings are those of the records.
    """

    dataset: str
    profile: str
    records: list[Any]
    latency: dict[str, Any] | None
    failed: list[str]
    names: dict[str, Any]


def _read_folder(path: Path) -> list[_Source]:
    finished: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(path.glob("*/*/result.json"), key=lambda file: (file.stat().st_mtime_ns, str(file))):
        record = read_json(file)
        key = file.parent.parent.name, _run(record, file).record["spec"].get("profile", "unknown")
        finished.setdefault(key, {})[file.parent.name] = record
    failed: dict[tuple[str, str], list[str]] = {}
    for file in sorted(path.glob("*/*/failure.json")):
        state = read_state(file.parent)
        if state is not None and state.state == "failed":
            failed.setdefault((state.spec["dataset"], state.spec["profile"]), []).append(describe_failure(state))
    sources = []
    for dataset, profile in sorted(finished.keys() | failed.keys()):
        records, lines = finished.get((dataset, profile), {}), failed.get((dataset, profile), [])
        latency = latency_of(path / dataset)
        sources.append(_Source(dataset, profile, list(records.values()), latency, lines, records))
    return sources


def _read_compact(path: Path) -> list[_Source]:
    sources = []
    for file in sorted(path.glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or not content.get("runs"):
            continue
        try:
            spec = content["runs"][0]["spec"]
            dataset, profile = spec["dataset"], spec.get("profile", "unknown")
        except (KeyError, TypeError) as error:
            raise MIDLError(f"report: {file} has a record without {error}, expected those of midl reproduce") from error
        latency = content.get("latency") and of_runs(content["latency"], None)
        sources.append(_Source(dataset, profile, content["runs"], latency, content.get("failed", []), {}))
    return sources


def _most_frequent(values: list[str]) -> str:
    return max(sorted(set(values)), key=values.count)


def _unusual(profile: str, precisions: dict[str, str]) -> str | None:
    """Return the precision that had to be asked for, or None where every data set has the profile's own."""
    own = PROFILES[profile].precision_for if profile in PROFILES else lambda dataset: "no"
    asked = [precision for dataset, precision in precisions.items() if precision != own(dataset)]
    return _most_frequent(asked) if asked else None


def _precision(record: dict[str, Any]) -> str:
    return record["spec"].get("recipe", {}).get("precision", "no")


def _run(record: Any, path: Path) -> Run:
    try:
        spec = record["spec"]
        for name in _NUMBERS:
            float(record[name])
        for share in record["fraction_active"].values():
            float(share)
        return Run(
            spec["dataset"], spec["method"], spec["seed"], spec.get("train_fraction", 1.0),
            spec.get("label_noise", 0.0), record,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MIDLError(f"report: {path} has a record without {error}, expected those of midl reproduce") from error


def _is_plain(run: Run) -> bool:
    return run.train_fraction == 1 and not run.label_noise


def _selects(record: dict[str, Any]) -> bool:
    """Return whether a MID-L layer gives some of its neurons the full path, not none and not all.

    Layers that were left dense are not among those whose share is measured.
    """
    return any(0 < share < 1 for share in record["fraction_active"].values())
