"""The report's charts, each with its text alternative and the table behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from midl.lab.methods import METHODS
from midl.lab.report import svg
from midl.lab.report.numbers import count, seconds
from midl.lab.report.records import Results
from midl.lab.report.svg import Point
from midl.lab.report.table import Cell, Table
from midl.lab.report.tables import title
from midl.lab.reproduce.latency import timed_on
from midl.lab.statistics import estimate_mean

__all__ = ["Chart", "accuracy_charts", "activity_charts", "gate_charts", "legend", "robustness_charts", "smi_charts"]

_SETS = ("selected", "unselected", "random")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart: heading, SVG and the table of what it shows."""

    title: str
    svg: str
    table: Table


def legend(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return (SVG mark, name) of methods or of sets of neurons, in the order given."""
    return [
        (f'<svg viewBox="-8 -8 16 16" aria-hidden="true">{svg.mark(_shape(key), 0, 0, key)}</svg>', title(key))
        for key in keys
    ]


def _shape(key: str) -> int:
    return _SETS.index(key) + 6 if key in _SETS else list(METHODS).index(key) if key in METHODS else 0


def accuracy_charts(results: Results, dataset: str) -> list[Chart]:
    """Return test accuracy against FLOPs, and against latency where it was measured, on dense's machine alone."""
    methods = results.methods(dataset)
    flops = {m: estimate_mean([r["flops"] for r in results.seeds(dataset, m).values()]).mean for m in methods}
    charts = [_against(results, dataset, "FLOPs per input", {m: (v / 1e6, count(v)) for m, v in flops.items()}, "M")]
    latency = results.latency.get(dataset, {"methods": {}})
    place = results.place_of_dense(dataset)
    timed = {method: times for method, times in latency["methods"].items() if timed_on(latency, method) == place}
    for batch in ("1", "32", "256"):
        times = {m: timed[m]["batch"][batch]["median"] for m in methods if batch in timed.get(m, {}).get("batch", {})}
        if times:
            shown = {m: (1e3 * value, seconds(value)) for m, value in times.items()}
            charts.append(_against(results, dataset, f"latency at batch {batch}", shown, "ms"))
    return charts


def _against(results: Results, dataset: str, what: str, costs: dict[str, tuple[float, str]], unit: str) -> Chart:
    series, rows = {}, []
    for method, (cost, text) in costs.items():
        accuracy = estimate_mean(list(results.values(dataset, method, "accuracy").values()))
        series[method] = (_shape(method), title(method), Point(cost, accuracy.mean, accuracy.sd or 0.0))
        spread = "" if accuracy.sd is None else f"{accuracy.sd:.2f}"
        rows.append(
            [
                Cell(title(method)), Cell(text, cost), Cell(f"{accuracy.mean:.2f}", accuracy.mean),
                Cell(spread, accuracy.sd),
            ]
        )  # fmt: skip
    best = max(series, key=lambda m: series[m][2].y)
    alternative = (
        f"{dataset}: test accuracy against {what} of {len(series)} methods. Most accurate: {title(best)}, "
        f"{series[best][2].y:.2f} %. All numbers are in the table below."
    )
    table = Table(f"{dataset}: accuracy against {what}", ["method", what, "test accuracy %", "sd over seeds"], rows)
    drawn = svg.scatter(series, f"{what} ({unit})", "test accuracy (%)", alternative)
    return Chart(f"Accuracy against {what}", drawn, table)


def robustness_charts(results: Results, dataset: str) -> list[Chart]:
    """Return, per corruption, accuracy against its strength, means over seeds."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method in results.methods(dataset):
        for record in results.seeds(dataset, method).values():
            for name, curve in record.get("measures", {}).get("robustness", {}).get("curves", {}).items():
                curves.setdefault(name, {}).setdefault(method, []).append(curve)
    charts = []
    for name, by_method in curves.items():
        first = next(iter(by_method.values()))[0]
        strengths, words = first["strengths"], name.replace("_", " ")
        means = {m: np.mean([curve["accuracy"] for curve in runs], axis=0) for m, runs in by_method.items()}
        series = {
            m: (_shape(m), title(m), [Point(s, float(v)) for s, v in zip(strengths, values, strict=True)])
            for m, values in means.items()
        }
        rows = [[Cell(title(m)), *(Cell(f"{v:.1f}", float(v)) for v in values)] for m, values in means.items()]
        table = Table(
            f"{dataset}: accuracy (%) under {words}; strength: {first['unit']}",
            ["method", *(f"{strength:g}" for strength in strengths)], rows,
        )  # fmt: skip
        alternative = (
            f"{dataset}: accuracy of {len(series)} methods against the strength of {words}. "
            "All numbers are in the table below."
        )
        charts.append(Chart(words, svg.lines(series, first["unit"], "test accuracy (%)", alternative), table))
    return charts


def smi_charts(record: dict[str, Any], dataset: str) -> list[Chart]:
    """Return, for each of the two views of one run, the sliced mutual information of the layers' sets of neurons."""
    layers = record.get("measures", {}).get("smi", {}).get("layers", {})
    charts = []
    for view, words in (("inputs", "each input's own choice"), ("neurons", "neurons often selected")):
        if not layers:
            continue
        shown = {
            name: {key: (_shape(key), *(layer[view][key][part] for part in ("mean", "low", "high"))) for key in _SETS}
            for name, layer in layers.items()
        }
        rows = [
            [Cell(name), *(Cell(f"{v:.3f} [{low:.3f}, {high:.3f}]", v) for _, v, low, high in sets.values())]
            for name, sets in shown.items()
        ]
        table = Table(f"{dataset}: SMI in nats, {words} [95 % over slices]", ["layer", *_SETS], rows)
        alternative = (
            f"{dataset}: sliced mutual information of selected, unselected and random neurons in {len(layers)} layers, "
            f"{words}. All numbers are in the table below."
        )
        drawn = svg.intervals(shown, "nats", alternative)
        charts.append(Chart(f"SMI, {words}", drawn, table))
    return charts


def activity_charts(record: dict[str, Any], dataset: str) -> list[Chart]:
    """Return, per layer of one run, how often the inputs of each class select each group."""
    charts = []
    for name, by_class in record.get("measures", {}).get("activity", {}).get("layers", {}).items():
        known = [row for row in by_class if row is not None]
        values = np.array([row if row is not None else [np.nan] * len(known[0]) for row in by_class], dtype=float)
        order = np.argsort(-np.nanmean(values, axis=0), kind="stable")
        rows = [_class_row(label, row) for label, row in enumerate(values)]
        columns = ["class", "always (≥ 99 %)", "never (≤ 1 %)", "most used groups"]
        alternative = (
            f"{dataset}, layer {name}: share of the inputs of each of {len(values)} classes that select each of "
            f"{values.shape[1]} groups. A summary is in the table below."
        )
        drawn = svg.heat_map(values[:, order], "class", "group, most used first", alternative)
        table = Table(f"{dataset}, layer {name}: groups that the classes select", columns, rows)
        charts.append(Chart(f"Activity, layer {name}", drawn, table))
    return charts


def _class_row(label: int, usage: np.ndarray) -> list[Cell]:
    if np.isnan(usage).any():
        return [Cell(str(label), label), Cell("no test row"), Cell(""), Cell("")]
    top = np.argsort(-usage, kind="stable")[:5]
    always, never = int((usage >= 0.99).sum()), int((usage <= 0.01).sum())
    most = ", ".join(f"{group} ({100 * usage[group]:.0f} %)" for group in top)
    return [Cell(str(label), label), Cell(str(always), always), Cell(str(never), never), Cell(most)]


def gate_charts(record: dict[str, Any], dataset: str) -> list[Chart]:
    """Return, per layer of one run, the histogram of the gate's logits, and of its values where they are used."""
    charts = []
    for name, gate in record.get("measures", {}).get("gate", {}).get("layers", {}).items():
        kinds = [("logits", "logit")] + ([("values", "value")] if gate["interpolation"] == "sigmoid" else [])
        for kind, word in kinds:
            edges, everything, selected = (gate[kind][part] for part in ("edges", "all", "selected"))
            rows = [
                [Cell(f"{low:.2f} to {high:.2f}", low), Cell(str(total), total), Cell(str(chosen), chosen)]
                for low, high, total, chosen in zip(edges, edges[1:], everything, selected, strict=False)
            ]
            table = Table(f"{dataset}, layer {name}: gate {kind}", [f"gate {word}", "all groups", "selected"], rows)
            alternative = (
                f"{dataset}, layer {name}: histogram of the gate {kind} of all groups and of the selected ones, "
                f"between {edges[0]:.2f} and {edges[-1]:.2f}. All numbers are in the table below."
            )
            drawn = svg.histogram(edges, {"all": everything, "selected": selected}, f"gate {word}", alternative)
            charts.append(Chart(f"Gate {kind}, layer {name}", drawn, table))
    return charts
