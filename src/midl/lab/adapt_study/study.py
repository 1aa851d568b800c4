"""The rows behind docs/adapt.md: networks adapted to budgets, beside low rank, the uniform budget and the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.adaptation import adapt, distil
from midl.errors import MIDLError
from midl.lab.adapt_study.batches import CALIBRATION_ROWS, ShuffledBatches, calibration_batches
from midl.lab.adapt_study.low_rank import factorise
from midl.lab.adapt_study.oracle import select_by_oracle
from midl.lab.adapt_study.subject import Subject, distillation
from midl.lab.data import Dataset
from midl.lab.files import write_json
from midl.lab.measure import layer_flops, measure_accuracy, measure_latency

__all__ = ["Settings", "run_study"]

_LATENCY_BATCHES = (1, 32, 256)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run, per seed.

    Args:
        budgets: FLOPs of the dense network, divided by those of the adapted one.
        group_sizes: neurons selected together.
        distil_epochs: of distillation; the docs report at most a fifth of the dense training's epochs.
        seed: of everything.
    """

    budgets: tuple[float, ...] = (1.7, 2.5)
    group_sizes: tuple[int, ...] = (1, 16, 32)
    distil_epochs: int = 2
    seed: int = 0


Row = dict[str, Any]
"""One adapted network. Accuracies are test accuracies in percent: ``dense``; ``plain``: converted without data, the
same ratio in every layer; ``calibrated``: adapted without training; ``distilled``; ``uniform``: calibrated, with every
layer at the same density and rank share; ``gated``: calibrated, with a gate and a full path in every layer that does
not stay dense, and ``oracle``: the same with the best selection; ``low_rank`` and ``low_rank_distilled``: low rank
alone at the same FLOPs, the same ratio in every layer. ``dense_distilled``: the dense network
itself, trained on for as long in the same way. ``active``: share of neurons on the full path, averaged over the
layers that are not dense. ``latency``: batch to median seconds, dense and adapted."""


def run_study(
    subject: Subject, settings: Settings, folder: Path, on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Return a row per budget and group size; what is in ``folder`` is not done again, so a stopped run goes on.

    A row is written after every training and every conversion. The time to run is measured last, of the network that
    was saved: a row whose ``latency`` was removed is timed again.

    Args:
        subject: data set and architecture.
        settings: what to run.
        folder: of ``<subject>-seed<seed>.json``, the trained dense networks and the adapted ones.
        on_row: called with each row as it is done or found.
    """
    file = folder / f"{subject.name}-seed{settings.seed}.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    dense = subject.train_dense(settings.seed, folder)
    study = _Study(subject, settings, folder, dense, calibration_batches(subject.dataset, settings.seed))
    for budget in settings.budgets:
        for group_size in settings.group_sizes:
            row = next((row for row in rows if (row["budget"], row["group_size"]) == (budget, group_size)), None)
            if row is None:
                row = {"dataset": subject.name, "seed": settings.seed, "budget": budget, "group_size": group_size}
                rows.append(row)
            for names, measure in study.steps(budget, group_size, rows):
                if any(name not in row for name in names):
                    row |= measure()
                    write_json(file, rows)
            on_row(row)
    return rows


@dataclasses.dataclass(frozen=True)
class _Study:
    subject: Subject
    settings: Settings
    folder: Path
    dense: nn.Module
    batches: Sequence[Tensor]

    def steps(
        self, budget: float, group_size: int, rows: Sequence[Row]
    ) -> list[tuple[tuple[str, ...], Callable[[], Row]]]:
        """Return the parts of a row, each with what measures it; what knows no groups is taken from ``rows``."""
        same_budget = [row for row in rows if row["budget"] == budget]
        return [
            (("flops_ratio", "active", "calibrated", "distilled", "layers"), lambda: self._adapted(budget, group_size)),
            (("dense",), lambda: {"dense": self._accuracy(self.dense)}),
            (
                ("low_rank", "low_rank_distilled"),
                lambda: _found(same_budget, "low_rank", "low_rank_distilled") or self._low_rank(budget),
            ),
            (
                ("dense_distilled",),
                lambda: _found(rows, "dense_distilled") or {"dense_distilled": self._distil(copy.deepcopy(self.dense))},
            ),
            (("uniform",), lambda: self._uniform(budget, group_size)),
            (("gated", "oracle"), lambda: self._gated(budget, group_size)),
            (("plain",), lambda: {"plain": self._plain(budget, group_size)}),
            (("latency",), lambda: self._time(budget, group_size)),
        ]

    def _adapted(self, budget: float, group_size: int) -> Row:
        model, report = self._adapt(budget, group_size)
        row: Row = {"kd_ratio": self.subject.recipes().kd_ratio, "flops_ratio": report.flops_ratio}
        row["active"] = sum(layer.active for layer in report.changed) / len(report.changed)
        row |= {"calibrated": self._accuracy(model), "distilled": self._distil(model)}
        midl.save(model, self._file(budget, group_size))
        return row | {"layers": [dataclasses.asdict(layer) for layer in report.layers]}

    def _low_rank(self, budget: float) -> Row:
        model = copy.deepcopy(self.dense)
        factorise(model, self._names(), self.batches, budget)
        return {"low_rank": self._accuracy(model), "low_rank_distilled": self._distil(model)}

    def _uniform(self, budget: float, group_size: int) -> Row:
        return {"uniform": self._accuracy(self._adapt(budget, group_size, allocation="uniform")[0])}

    def _time(self, budget: float, group_size: int) -> Row:
        """Return how long the dense network and the saved one take."""
        adapted, latency = midl.load_(copy.deepcopy(self.dense), self._file(budget, group_size)).eval(), {}
        for batch in _LATENCY_BATCHES:
            x = self.dataset.batch(self.dataset.test, slice(0, batch))[0]
            times = measure_latency({"dense": self.dense, "adapted": adapted}, x)
            latency[str(batch)] = {name: found["median"] for name, found in times.items()}
        return {"latency": latency, "threads": torch.get_num_threads()}

    def _file(self, budget: float, group_size: int) -> Path:
        return self.folder / f"{self.subject.name}-{budget:g}x-groups{group_size}-seed{self.settings.seed}.safetensors"

    def _adapt(self, budget: float, group_size: int, **choices: Any) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(self.dense)
        names = self._names()
        report = adapt(
            model, self.batches, budget, group_size=group_size, samples=CALIBRATION_ROWS, seed=self.settings.seed,
            filter_fn=lambda module, name: name in names, **choices,
        )  # fmt: skip
        return model, report

    def _gated(self, budget: float, group_size: int) -> Row:
        """Return the accuracies by the gates and by the best selection; None where gates cannot meet the budget."""
        try:
            model = self._adapt(budget, group_size, light_alone=False)[0]
        except MIDLError:
            return {"gated": None, "oracle": None}
        row: Row = {"gated": self._accuracy(model)}
        with select_by_oracle(model, self.batches[0]):
            return row | {"oracle": self._accuracy(model)}

    def _distil(self, model: nn.Module) -> float:
        """Distil in place and return the accuracy."""
        settings, batches = self.settings, ShuffledBatches(self.dataset, self.settings.seed)
        choices = distillation(self.subject.recipes())
        distil(model, self.dense, batches, epochs=settings.distil_epochs, seed=settings.seed, **choices)
        return self._accuracy(model)

    def _plain(self, budget: float, group_size: int) -> float | None:
        """Return the accuracy of a conversion without data: every layer the same ratio, light path by SVD."""
        model = copy.deepcopy(self.dense)
        names = self._names()
        for active in (
            0.45 * 1.7 / budget,
            0.3 / budget,
        ):  # the second where the first leaves nothing for the light path
            ratio = _layer_ratio(model, names, self.batches[0][:1], budget)
            config = midl.MIDConfig(
                active=active, flops_ratio=ratio, group_size=group_size, gate="light", interpolation="hard"
            )
            try:
                midl.convert_(model, config, overrides=dict.fromkeys(names, config), filter_fn=lambda m, n: n in names)
            except MIDLError:
                continue
            return self._accuracy(model)
        return None

    def _accuracy(self, model: nn.Module) -> float:
        return measure_accuracy(model, self.dataset)[0]

    def _names(self) -> list[str]:
        return self.subject.architecture.layer_names

    @property
    def dataset(self) -> Dataset:
        return self.subject.dataset


def _found(rows: Sequence[Row], *names: str) -> Row:
    """Return these parts of the first row that has them, or nothing."""
    return next(({name: row[name] for name in names} for row in rows if all(name in row for name in names)), {})


def _layer_ratio(model: nn.Module, names: Sequence[str], x: Tensor, budget: float) -> float:
    """Return the ratio by which the named layers must shrink so that the whole model shrinks by ``budget``."""
    total, own = midl.count_flops(model, x), sum(layer_flops(model, x, list(names)).values())
    return own / (total / budget - (total - own))
