"""The study's folders as Markdown tables: means over seeds, differences paired by seed with 95 % intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.statistics import Estimate, estimate_mean, paired_difference

__all__ = ["render"]

_BUDGETS = (
    ("dense", "dense"), ("plain", "converted without data"), ("calibrated", "calibrated"),
    ("gated", "a gate in every sparse layer"), ("oracle", "its oracle"), ("distilled", "distilled"),
    ("low_rank_distilled", "low rank alone, distilled"), ("dense_distilled", "dense, distilled from itself"),
)  # fmt: skip


def render(folder: Path) -> str:
    """Return the tables of everything that a folder of :mod:`midl.lab.adapt_study` holds, as Markdown.

    Raises:
        MIDLError: there is nothing in it, or nothing finished.
    """
    rows = [row for file in sorted(folder.glob("*-seed*.json")) for row in json.loads(file.read_text())]
    if not rows:
        raise MIDLError(f"render: {folder} has no results, expected <data set>-seed<seed>.json files")
    parts: list[str] = []
    for dataset in sorted({row["dataset"] for row in rows}):
        own = [row for row in rows if row["dataset"] == dataset]
        parts += _budget_tables(dataset, [row for row in own if {"distilled", "latency"} <= row.keys()])
        parts += _latency_table(dataset, [row for row in own if "served" in row])
        parts += _elastic_table(dataset, [row for row in own if "elastic" in row])
        parts += _threshold_table(dataset, [row for row in own if "threshold" in row])
        for mode in ("scratch", "converted"):
            parts += _ablation_table(dataset, mode, [row for row in own if row.get("mode") == mode])
    if not parts:
        raise MIDLError(f"render: {folder} has no finished rows, expected the study that began them to go on first")
    return "\n".join(parts)


def _budget_tables(dataset: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield f"### {dataset}: adapted to a budget\n"
    batches = list(rows[0]["latency"])
    speeds = "".join(f" speed, batch {batch} |" for batch in batches)
    titles = [title for _, title in _BUDGETS]
    titles += ["distilled - dense", "layer-wise - uniform, calibrated"]
    yield f"| budget | G | seeds | {' | '.join(titles)} |{speeds}"
    yield "|" + "---|" * (3 + len(titles) + len(batches))
    for budget, group_size in sorted({(row["budget"], row["group_size"]) for row in rows}):
        same = [row for row in rows if (row["budget"], row["group_size"]) == (budget, group_size)]
        cells = [_mean(same, name) for name, _ in _BUDGETS]
        cells += [_difference(same, "distilled", "dense"), _difference(same, "calibrated", "uniform")]
        for batch in batches:
            ratios = [row["latency"][batch]["dense"] / row["latency"][batch]["adapted"] for row in same]
            cells.append(f"{estimate_mean(ratios).mean:.2f}x")
        yield f"| {budget:g}x | {group_size} | {len(same)} | " + " | ".join(cells) + " |"
    yield ""


def _latency_table(dataset: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield f"### {dataset}: budgets of time against one of FLOPs\n"
    batches = list(next(row["latency"] for row in rows if "latency" in row))
    titles = ["budget", "G", "seeds", "dense", "calibrated", "calibrated - dense", "FLOPs"]
    titles += [f"speed, batch {batch}" for batch in batches]
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for group_size, served, budget in sorted({(r["group_size"], r["served"] or 0, r["budget"]) for r in rows}):
        kind = f"time at batch {served}" if served else "FLOPs"
        same = [r for r in rows if (r["group_size"], r["served"] or 0, r["budget"]) == (group_size, served, budget)]
        met = [row for row in same if "refused" not in row]
        cells = [f"{budget:g}x {kind}", f"{group_size}", f"{len(met)}"]
        if met:
            cells += [_mean(met, "dense"), _mean(met, "calibrated"), _difference(met, "calibrated", "dense")]
            cells.append(f"{estimate_mean([row['flops_ratio'] for row in met]).mean:.2f}x")
            for batch in batches:
                ratios = [row["latency"][batch]["dense"] / row["latency"][batch]["adapted"] for row in met]
                cells.append(f"{estimate_mean(ratios).mean:.2f}x")
        else:
            nearest = same[0]["refused"].partition("expected ")[2].partition(":")[0]
            cells += [
                "",
                f"cannot be met: {nearest}" if nearest.startswith("at most") else "cannot be met: none is faster",
            ]
            cells += [""] * (len(titles) - len(cells))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _elastic_table(dataset: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield f"### {dataset}: one elastic network against one network per budget\n"
    yield "| active | seeds | dense | elastic | made for this budget | elastic - alone |"
    yield "|---|---|---|---|---|---|"
    for active in sorted({row["active"] for row in rows}):
        same = [row for row in rows if row["active"] == active]
        cells = [_mean(same, name) for name in ("dense", "elastic", "alone")]
        yield f"| {active:.0%} | {len(same)} | " + " | ".join([*cells, _difference(same, "elastic", "alone")]) + " |"
    yield ""


def _threshold_table(dataset: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield f"### {dataset}: a fixed number of groups against a threshold\n"
    heads = ("fixed, undistilled", "threshold, undistilled", "fixed", "threshold", "threshold - fixed",
             "output error, undistilled", "active, fixed", "realised", "5 % to 95 % of the inputs")  # fmt: skip
    speeds = (("1", "batch 1"), ("32", "batch 32"), ("least", "inputs that take least"), ("most", "most"))
    titles = ["budget", "G", "seeds", "dense", *heads, *(f"speed, {title}" for _, title in speeds)]
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)
    for budget in sorted({row["budget"] for row in rows}):
        same = [row for row in rows if row["budget"] == budget]
        names = ("dense", "fixed_calibrated", "threshold_calibrated", "fixed", "threshold")
        cells = [*(_mean(same, name) for name in names), _difference(same, "threshold", "fixed")]
        error = [row["threshold_error"] / row["fixed_error"] for row in same]
        cells.append(f"{estimate_mean(error).mean:.3f} of fixed")
        active, realised, low, high = (
            estimate_mean([row[name] for row in same]).mean for name in ("active", "realised", "low", "high")
        )
        cells += [f"{active:.3f}", f"{realised:.3f}", f"{low:.3f} to {high:.3f}"]
        for kind, _ in speeds:
            fixed, threshold = (
                estimate_mean([row["latency"][kind]["dense"] / row["latency"][kind][name] for row in same]).mean
                for name in ("fixed", "threshold")
            )
            cells.append(f"{fixed:.2f}x, {threshold:.2f}x")
        yield f"| {budget:g}x | {same[0]['group_size']} | {len(same)} | " + " | ".join(cells) + " |"
    yield ""


def _ablation_table(dataset: str, mode: str, rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield f"### {dataset}: ablation, {mode}\n"
    yield "| variant | seeds | before training | accuracy | against base |"
    yield "|---|---|---|---|---|"
    base = {row["seed"]: row["accuracy"] for row in rows if row["variant"] == "base"}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = [row for row in rows if row["variant"] == variant]
        against = (
            "" if variant == "base" else _signed(paired_difference({r["seed"]: r["accuracy"] for r in same}, base))
        )
        yield f"| {variant} | {len(same)} | {_mean(same, 'before')} | {_mean(same, 'accuracy')} | {against} |"
    yield ""


def _mean(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{estimate_mean(values).mean:.2f}" if values else "cannot be met"


def _difference(rows: Sequence[dict[str, Any]], ours: str, theirs: str) -> str:
    return _signed(
        paired_difference({row["seed"]: row[ours] for row in rows}, {row["seed"]: row[theirs] for row in rows})
    )


def _signed(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    interval = "" if difference.low is None else f" ({difference.low:+.2f} to {difference.high:+.2f})"
    text = f"{difference.mean:+.2f}{interval}"
    return f"**{text}**" if difference.excludes_zero else text
