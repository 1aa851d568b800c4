"""The report's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midl.lab.methods import METHODS
from midl.lab.report.claims import Judged, robustness_areas
from midl.lab.report.numbers import count, interval, place_name, plus_minus, ratio_to_dense, seconds, signed, size
from midl.lab.report.records import PAPER_SETS, Results
from midl.lab.report.table import Cell, Table
from midl.lab.report.verdicts import Verdict
from midl.lab.reproduce.latency import timed_on
from midl.lab.statistics import Estimate, estimate_mean, paired_difference

__all__ = [
    "accuracy_table", "claims_table", "cost_table", "coverage_table", "latency_table", "overfitting_table",
    "overview_table", "robustness_table", "smi_table", "title",
]  # fmt: skip

MISSING = Cell("not run", float("-inf"), kind="missing")
_REASONS = {
    "svhn": ": its data could not be had offline when the published results were made; midl reproduce --data svhn runs "
    "it where the hub or a mirror has it"
}
_INTERVAL = "[95\u00a0%\u00a0t]"  # kept on one line
_VS = f"vs dense {_INTERVAL}"


def title(method: str) -> str:
    """Return a method's name for readers."""
    return METHODS[method].title if method in METHODS else method


def claims_table(results: Results, judged: Sequence[Judged]) -> Table:
    """Return claim, what the paper says, what was measured on each data set, the verdict and the command."""
    rows = []
    for item in judged:
        measured = [f"{e.dataset}: {e.text}" for e in item.evidence if e.verdict is not Verdict.MISSING]
        tally = f" ({item.tally})" if item.tally else ""
        rows.append(
            [
                Cell(item.claim.title), Cell(item.claim.paper or "a test of ours"), Cell("<br>".join(measured)),
                Cell(f"{item.verdict.value}{tally}"), Cell(f"`{item.claim.command(results)}`"),
            ]
        )  # fmt: skip
    return Table("Claims", ["claim", "paper", "measured", "verdict", "command"], rows, numeric=False)


def overview_table(results: Results) -> Table:
    """Return a row per data set: its best MID-L network that selects neurons, beside dense and dense narrowed."""
    rows = []
    for dataset in results.datasets:
        route = results.best_route(dataset)
        dense = results.values(dataset, "dense", "accuracy")
        if route is None or not dense:
            continue
        ours = results.values(dataset, route, "accuracy")
        records = list(results.seeds(dataset, route).values())
        active, fewer = (
            estimate_mean([record[above] / record[below] for record in records]).mean
            for above, below in (("active_neurons", "neurons"), ("dense_flops", "flops"))
        )
        batches = results.latency.get(dataset, {}).get("methods", {}).get(route, {}).get("batch", {})
        rows.append(
            [
                Cell(dataset),
                Cell(f"{estimate_mean(list(dense.values())).mean:.2f}"),
                Cell(f"{title(route)} {estimate_mean(list(ours.values())).mean:.2f}"),
                _difference(paired_difference(ours, dense)),
                _difference(paired_difference(ours, results.values(dataset, "narrow", "accuracy"))),
                Cell(f"{100 * active:.1f} %", active),
                Cell(f"{fewer:.2f}x", fewer),
                *(Cell(ratio_to_dense(t), t["ratio"]) if t else MISSING for t in map(batches.get, ("1", "32"))),
            ]
        )
    columns = [
        "data set", "dense, accuracy %", "best MID-L", "vs dense", "vs dense narrowed to its FLOPs", "active",
        "fewer FLOPs", "time / dense's, batch 1", "batch 32",
    ]  # fmt: skip
    return Table("The best MID-L network that selects neurons, of each data set", columns, rows)


def coverage_table(results: Results) -> Table:
    """Return how many seeds of each method have run on each data set, and what failed."""
    names = [*PAPER_SETS, *(name for name in results.datasets if name not in PAPER_SETS)]
    rows = []
    for name in names:
        methods = results.methods(name)
        if methods:
            seeds = {method: len(results.seeds(name, method)) for method in methods}
            text = ", ".join(f"{title(method)} {number}" for method, number in seeds.items())
        else:
            text = "not run" + _REASONS.get(name, "")
        text = "; ".join([text, *(f"failed: {reason}" for reason in results.failed.get(name, []))])
        rows.append([Cell(name), Cell(text)])
    return Table("Seeds of each method", ["data set", "seeds"], rows, numeric=False)


def accuracy_table(results: Results, dataset: str) -> Table:
    """Return test accuracy and the paired difference to dense, with intervals."""
    dense = results.values(dataset, "dense", "accuracy")
    rows = []
    for method in results.methods(dataset):
        values = results.values(dataset, method, "accuracy")
        accuracy = estimate_mean(list(values.values()))
        difference = None if method == "dense" else paired_difference(values, dense)
        train = estimate_mean(list(results.values(dataset, method, "train_accuracy").values()))
        rows.append(
            [
                Cell(title(method)),
                Cell(plus_minus(accuracy), accuracy.mean),
                _difference(difference),
                _bootstrap(difference),
                Cell(plus_minus(train), train.mean),
                Cell(str(len(values)), len(values)),
            ]
        )
    columns = ["method", "test accuracy %", _VS, "bootstrap 95 %", "train accuracy %", "seeds"]
    return Table(f"{dataset}: accuracy, mean ± standard deviation over seeds", columns, rows)


def cost_table(results: Results, dataset: str) -> Table:
    """Return active neurons, FLOPs, weights and memory."""
    rows = []
    for method in results.methods(dataset):
        records = list(results.seeds(dataset, method).values())

        def mean(field: str, records: list[dict[str, Any]] = records) -> float:
            return estimate_mean([float(record[field]) for record in records]).mean

        active, ratio = mean("active_neurons") / mean("neurons"), mean("dense_flops") / mean("flops")
        rows.append(
            [
                Cell(title(method)),
                Cell(f"{100 * active:.1f}", active),
                Cell(count(mean("flops")), mean("flops")),
                Cell(f"{ratio:.2f}x", ratio),
                Cell(count(mean("parameters")), mean("parameters")),
                Cell(size(mean("weight_bytes")), mean("weight_bytes")),
                Cell(size(mean("saved_bytes")), mean("saved_bytes")),
                Cell(size(mean("peak_bytes")), mean("peak_bytes")),
                Cell(seconds(mean("seconds")), mean("seconds")),
            ]
        )
    columns = [
        "method", "active %", "FLOPs per input", "fewer", "parameters", "weights", "kept per input", "peak, training",
        "training time",
    ]  # fmt: skip
    return Table(f"{dataset}: what it costs (FLOPs: two per multiply-add)", columns, rows)


def latency_table(results: Results, dataset: str) -> Table | None:
    """Return median times and their ratios to dense, or None where nothing was timed."""
    measured = results.latency.get(dataset, {}).get("methods", {})
    if not measured:
        return None
    batches = sorted({batch for times in measured.values() for batch in times["batch"]}, key=int)
    order = [method for method in METHODS if method in measured]
    place = results.place_of_dense(dataset)
    rows = []
    for method in order:
        times = [measured[method]["batch"].get(batch) for batch in batches] + [measured[method].get("step")]
        cells = [cell for entry in times for cell in _time(entry)]
        own = timed_on(results.latency[dataset], method)
        elsewhere = "" if own == place else f" (on {place_name(own)})"
        rows.append([Cell(title(method) + elsewhere), *cells])
    names = [f"batch {batch}" for batch in batches] + ["training step"]
    columns = ["method", *(text for name in names for text in (name, "of dense"))]
    what = f"time, median (quartiles), and its ratio to dense within interleaved pairs [95 %], on {place_name(place)}"
    return Table(f"{dataset}: {what}", columns, rows)


def _time(entry: dict[str, Any] | None) -> tuple[Cell, Cell]:
    if not entry:
        return MISSING, MISSING
    text = seconds(entry["median"], entry["low"], entry["high"])
    text += f", {entry['form']}" if "form" in entry else ""
    return Cell(text, entry["median"]), Cell(ratio_to_dense(entry), entry["ratio"])


def overfitting_table(results: Results, dataset: str) -> Table | None:
    """Return train and test accuracy and their gap with little and with mislabelled training data."""
    variants = results.variants(dataset)
    if len(variants) < 2:
        return None
    rows = []
    for fraction, noise in variants:
        dense = _gaps(results, dataset, "dense", fraction, noise)
        for method in METHODS:
            records = results.seeds(dataset, method, fraction, noise)
            if not records or ((fraction, noise) == (1.0, 0.0) and not _is_studied(results, dataset, method)):
                continue
            train, test = (
                estimate_mean([record[field] for record in records.values()])
                for field in ("train_accuracy", "accuracy")
            )
            gaps = _gaps(results, dataset, method, fraction, noise)
            difference = None if method == "dense" else paired_difference(gaps, dense)
            dense_test = results.values(dataset, "dense", "accuracy", fraction=fraction, noise=noise)
            ours = {seed: record["accuracy"] for seed, record in records.items()}
            rows.append(
                [
                    Cell(f"{100 * fraction:g} % of the rows", fraction) if not noise
                    else Cell(f"{100 * noise:g} % random labels", 1 + noise),
                    Cell(title(method)),
                    Cell(plus_minus(train), train.mean),
                    Cell(plus_minus(test), test.mean),
                    _difference(None if method == "dense" else paired_difference(ours, dense_test)),
                    Cell(signed(estimate_mean(list(gaps.values())).mean), estimate_mean(list(gaps.values())).mean),
                    _difference(difference),
                ]
            )  # fmt: skip
    columns = [
        "training data", "method", "train accuracy %", "test accuracy %", f"test {_VS}", "gap",
        f"gap {_VS}",
    ]  # fmt: skip
    return Table(f"{dataset}: overfitting (gap: train minus test accuracy, in points)", columns, rows)


def _is_studied(results: Results, dataset: str, method: str) -> bool:
    return any(results.seeds(dataset, method, *v) for v in results.variants(dataset) if v != (1.0, 0.0))


def _gaps(results: Results, dataset: str, method: str, fraction: float, noise: float) -> dict[int, float]:
    records = results.seeds(dataset, method, fraction, noise)
    return {seed: record["train_accuracy"] - record["accuracy"] for seed, record in records.items()}


def robustness_table(results: Results, dataset: str) -> Table | None:
    """Return the area under each corruption's accuracy curve, with the paired difference to dense."""
    dense = robustness_areas(results, dataset, "dense")
    names = list(dict.fromkeys(name for areas in dense.values() for name in areas))
    if not names:
        return None
    rows = []
    for method in results.methods(dataset):
        areas = robustness_areas(results, dataset, method)
        if not areas:
            continue
        cells = [Cell(title(method))]
        for name in names:
            ours = {seed: area[name] for seed, area in areas.items()}
            mean = estimate_mean(list(ours.values()))
            theirs = {seed: area[name] for seed, area in dense.items()}
            difference = None if method == "dense" else paired_difference(ours, theirs)
            cells += [Cell(plus_minus(mean), mean.mean), _difference(difference)]
        rows.append(cells)
    columns = ["method", *(text for name in names for text in (name.replace("_", " "), _VS))]
    return Table(f"{dataset}: accuracy on corrupted inputs, mean over the strengths (%)", columns, rows)


def smi_table(results: Results, dataset: str, method: str) -> Table | None:
    """Return the sliced mutual information of the layers' sets of neurons, means over seeds."""
    measured = [
        record["measures"]["smi"]
        for record in results.seeds(dataset, method).values()
        if record.get("measures", {}).get("smi", {}).get("layers")
    ]
    if not measured:
        return None
    rows = []
    for layer in measured[0]["layers"]:
        for view, words in (("inputs", "each input's own"), ("neurons", "fixed sets")):
            sets = [entry["layers"][layer][view] for entry in measured]
            cells = [Cell(layer), Cell(words)]
            for name in ("selected", "unselected", "random"):
                mean = estimate_mean([entry[name]["mean"] for entry in sets]).mean
                cells.append(Cell(f"{mean:.3f}", mean))
            for name in ("selected-unselected", "selected-random"):
                cells.append(_difference(estimate_mean([entry[name]["mean"] for entry in sets]), digits=3))
            rows.append(cells)
    columns = [
        "layer", "choice", "selected", "unselected", "random", f"selected − unselected {_INTERVAL}",
        f"selected − random {_INTERVAL}",
    ]  # fmt: skip
    return Table(f"{dataset}: sliced mutual information with the label, nats ({title(method)})", columns, rows)


def _difference(estimate: Estimate | None, digits: int = 2) -> Cell:
    if estimate is None:
        return Cell("", float("-inf"))
    return Cell(interval(estimate, digits), estimate.mean, strong=estimate.excludes_zero)


def _bootstrap(estimate: Estimate | None) -> Cell:
    if estimate is None or estimate.bootstrap is None:
        return Cell("", float("-inf"))
    low, high = estimate.bootstrap
    return Cell(f"[{signed(low)}, {signed(high)}]", estimate.mean)
