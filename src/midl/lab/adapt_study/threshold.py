"""The same number of groups for every input against as many as each needs, at the same average."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.adaptation import calibrate_threshold
from midl.adaptation.measure import dense_outputs, output_error
from midl.lab.adapt_study.batches import CALIBRATION_ROWS, ShuffledBatches, calibration_batches
from midl.lab.adapt_study.subject import Subject, distillation
from midl.lab.files import write_json
from midl.lab.measure import measure_accuracy, measure_latency
from midl.lab.measures.watching import mid_layers, watch_layers

__all__ = ["run_threshold"]

# Test inputs that are looked at one by one, and how many of them are timed.
_LOOKED_AT, _TIMED = 512, 32
Row = dict[str, Any]


def run_threshold(
    subject: Subject,
    seed: int,
    folder: Path,
    *,
    budgets: Sequence[float] = (1.7, 2.5),
    group_size: int = 16,
    distil_epochs: int = 1,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Return a row per budget: an adapted network with a fixed number of groups and the same one with thresholds.

    The weights are the same on both sides, the gates those of ``adapt(threshold=True)``. Thresholds are calibrated on
    training rows for what each layer takes anyhow, before distillation and, again, after it. ``..._error`` is the mean
    square of the change in the output that adapting makes, relative to the output's variance, on the first test rows
    and before distillation. ``active`` and ``realised`` are what both take on the test rows, ``low`` and ``high`` what
    5 % and 95 % of the test inputs stay below; latencies are seconds per input, one by one and in batches of 32, and
    one by one for the inputs that take ``least`` and ``most``. Finished parts are taken from ``folder``: without its
    ``latency`` a row is timed again.

    Args:
        subject: data set and architecture.
        seed: of everything.
        folder: of ``<subject>-threshold-seed<seed>.json``, the dense and the adapted networks.
        budgets: FLOPs of the dense network, divided by those of the adapted one.
        group_size: neurons selected together.
        distil_epochs: of the adapted network, with a fixed number of groups.
        on_row: called with each row as it is done or found.
    """
    file = folder / f"{subject.name}-threshold-seed{seed}.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    dense = subject.train_dense(seed, folder)
    for budget in budgets:
        row = next((row for row in rows if row["budget"] == budget), None)
        saved = file.with_name(f"{subject.name}-threshold-{budget:g}-seed{seed}.safetensors")
        if row is None:
            row, model = _adapt(subject, dense, budget, group_size, distil_epochs, seed)
            midl.save(model, saved)
            rows.append(row)
            write_json(file, rows)
        if "latency" not in row:
            row["latency"] = _time(subject, dense, midl.load_(copy.deepcopy(dense), saved).eval())
            row["threads"] = torch.get_num_threads()
            write_json(file, rows)
        on_row(row)
    return rows


def _adapt(
    subject: Subject, dense: nn.Module, budget: float, group_size: int, distil_epochs: int, seed: int
) -> tuple[Row, nn.Module]:
    """Return the row without latencies, and the network with thresholds."""
    dataset, names = subject.dataset, subject.architecture.layer_names
    batches = calibration_batches(dataset, seed)
    model = copy.deepcopy(dense)
    midl.adapt(
        model, batches, budget, group_size=group_size, samples=CALIBRATION_ROWS, seed=seed,
        filter_fn=lambda module, name: name in names, threshold=True,
    )  # fmt: skip
    row: Row = {"dataset": subject.name, "seed": seed, "budget": budget, "group_size": group_size}
    row |= {"epochs": distil_epochs, "dense": measure_accuracy(dense, dataset)[0]}

    x = [dataset.batch(dataset.test, slice(0, CALIBRATION_ROWS))[0]]
    outputs = dense_outputs(dense, x)
    row["threshold_error"] = output_error(model, x, outputs)
    row["threshold_calibrated"] = measure_accuracy(model, dataset)[0]
    for layer in mid_layers(model).values():
        layer.threshold = None
    row["active"] = float(_shares(model, x[0][:1]))
    row["fixed_error"] = output_error(model, x, outputs)
    row["fixed_calibrated"] = measure_accuracy(model, dataset)[0]
    choices = distillation(subject.recipes())
    midl.adaptation.distil(model, dense, ShuffledBatches(dataset, seed), epochs=distil_epochs, seed=seed, **choices)
    row["fixed"] = measure_accuracy(model, dataset)[0]
    calibrate_threshold(model, batches, samples=CALIBRATION_ROWS)
    row["threshold"] = measure_accuracy(model, dataset)[0]
    parts = torch.arange(len(dataset.test)).split(_LOOKED_AT)
    shares = torch.cat([_shares(model, dataset.batch(dataset.test, part)[0]) for part in parts])
    low, high = shares.quantile(torch.tensor([0.05, 0.95])).tolist()
    return row | {"realised": float(shares.mean()), "low": low, "high": high}, model


@torch.no_grad()
def _shares(model: nn.Module, x: Tensor) -> Tensor:
    """Return what each input takes: neurons on the full path over all its choices, of all there are, (rows,)."""
    layers = mid_layers(model)
    taken, total = torch.zeros(len(x)), 0

    def see(name: str, inputs: Tensor, outputs: Tensor, selected: Tensor) -> None:
        nonlocal total
        size = layers[name].config.group_size
        taken.add_((selected >= 0).sum((1, 2)) * size)
        total += selected.shape[1] * layers[name].num_groups * size

    with watch_layers(layers, see):
        model(x)
    return taken / total


class _OneByOne(nn.Module):
    """A model on its inputs one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> None:
        for row in x.split(1):
            self.model(row)


def _time(subject: Subject, dense: nn.Module, model: nn.Module) -> dict[str, dict[str, float]]:
    """Return medians of the seconds per input, by kind of call and network."""
    fixed = copy.deepcopy(model)
    for layer in mid_layers(fixed).values():
        layer.threshold = None
    models = {"dense": dense, "fixed": fixed, "threshold": model}
    one_by_one = {name: _OneByOne(m) for name, m in models.items()}
    # Some data sets are sorted by class.
    rows = torch.randperm(len(subject.dataset.test), generator=torch.Generator().manual_seed(0))[:_LOOKED_AT]
    x = subject.dataset.batch(subject.dataset.test, rows)[0]
    order = _shares(model, x).argsort()
    calls: dict[str, tuple[Mapping[str, nn.Module], Tensor]] = {
        "1": (one_by_one, x[:_TIMED]), "32": (models, x[:32]), "least": (one_by_one, x[order[:_TIMED]]),
        "most": (one_by_one, x[order[-_TIMED:]]),
    }  # fmt: skip
    return {
        kind: {name: found["median"] / len(inputs) for name, found in measure_latency(chosen, inputs).items()}
        for kind, (chosen, inputs) in calls.items()
    }
