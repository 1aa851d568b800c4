"""Budgets of time against a budget of FLOPs: what each is worth on the clock and in accuracy."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.adaptation.latency import clock
from midl.errors import MIDLError
from midl.lab.adapt_study.batches import CALIBRATION_ROWS, calibration_batches
from midl.lab.adapt_study.subject import Subject
from midl.lab.files import write_json
from midl.lab.measure import measure_accuracy

__all__ = ["run_latency"]

_TURNS = 100
Row = dict[str, Any]


def run_latency(
    subject: Subject,
    seed: int,
    folder: Path,
    *,
    budgets: Sequence[float] = (1.3, 1.5),
    flops_budget: float = 1.7,
    group_sizes: Sequence[int] = (1, 16),
    batches: Sequence[int] = (1, 32),
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Return a row per group size for the budget of FLOPs, and one per batch size served and budget of time.

    No network is distilled. ``latency`` has seconds of the dense and the adapted network at each batch size, timed
    anew after adapting by the clock that ``adapt`` uses; a budget that cannot be met has ``refused``, the error's
    words, instead. Finished parts are taken from ``folder``: without its ``latency`` a row is timed again.

    Args:
        subject: data set and architecture.
        seed: of everything.
        folder: of ``<subject>-latency-seed<seed>.json``, the dense and the adapted networks.
        budgets: the dense network's time on a batch, divided by that of the adapted one.
        flops_budget: for comparison.
        group_sizes: neurons selected together.
        batches: inputs served at a time.
        on_row: called with each row as it is done or found.
    """
    file = folder / f"{subject.name}-latency-seed{seed}.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    dense = subject.train_dense(seed, folder)
    wanted = [(flops_budget, None), *((budget, batch) for batch in batches for budget in budgets)]
    for group_size in group_sizes:
        for budget, served in wanted:
            key: Row = {"group_size": group_size, "budget": budget, "served": served}
            row = next((row for row in rows if key.items() <= row.items()), None)
            kind = "flops" if served is None else f"batch{served}"
            saved = file.with_name(f"{file.stem}-{kind}-{budget:g}x-groups{group_size}.safetensors")
            if row is None:
                row, model = _adapt(subject, dense, seed, **key)
                if model is not None:
                    midl.save(model, saved)
                rows.append(row)
                write_json(file, rows)
            if not row.keys() & {"latency", "refused"}:
                model = midl.load_(copy.deepcopy(dense), saved).eval()
                inputs = {batch: subject.dataset.batch(subject.dataset.test, slice(0, batch))[0] for batch in batches}
                row["latency"] = {str(batch): _time(dense, model, x) for batch, x in inputs.items()}
                write_json(file, rows)
            on_row(row)
    return rows


def _adapt(
    subject: Subject, dense: nn.Module, seed: int, group_size: int, budget: float, served: int | None
) -> tuple[Row, nn.Module | None]:
    """Return the row without latencies, and the network; None where the budget cannot be met."""
    dataset, names = subject.dataset, subject.architecture.layer_names
    row = {"dataset": subject.name, "seed": seed, "group_size": group_size, "budget": budget, "served": served}
    model = copy.deepcopy(dense)
    try:
        report = midl.adapt(
            model, calibration_batches(dataset, seed), budget, group_size=group_size, samples=CALIBRATION_ROWS,
            seed=seed, filter_fn=lambda module, name: name in names,
            latency_inputs=None if served is None else dataset.batch(dataset.train, slice(0, served))[0],
        )  # fmt: skip
    except MIDLError as error:
        return {**row, "refused": str(error)}, None
    return {
        **row, "dense": measure_accuracy(dense, dataset)[0], "calibrated": measure_accuracy(model, dataset)[0],
        "flops_ratio": report.flops_ratio, "latency_ratio": report.latency_ratio,
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
    }, model  # fmt: skip


@torch.no_grad()
def _time(dense: nn.Module, model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return median seconds, the networks taking turns; a call of each turn is not timed."""
    wall = torch.get_num_threads() > 1
    taken: dict[str, list[int]] = {"dense": [], "adapted": []}
    for turn in range(_TURNS):
        for name, network in (("dense", dense), ("adapted", model))[:: 1 - 2 * (turn % 2)]:
            for call in range(3):
                start = clock(wall)
                network(x)
                if call:
                    taken[name].append(clock(wall) - start)
    return {name: statistics.median(times) / 1e9 for name, times in taken.items()}
