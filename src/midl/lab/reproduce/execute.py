"""Executing one task of the plan, from wherever an earlier start left it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from midl.analysis import count_flops
from midl.errors import MIDLError
from midl.lab import methods
from midl.lab.data import Dataset, Split, rows_for_all
from midl.lab.distillation import distillation_loss
from midl.lab.environment import describe_environment
from midl.lab.files import write_json, write_text
from midl.lab.measure import measure_accuracy, peak_bytes, saved_bytes
from midl.lab.measures import measure_all
from midl.lab.methods import NETWORK_RATIO, Method, count_neurons, find
from midl.lab.processes import accelerator
from midl.lab.recipes import recipes_for
from midl.lab.reproduce.plan import MEASURES_VERSION, RESULTS_VERSION, Setting, Task, setting_for
from midl.lab.reproduce.profiles import profile_named
from midl.lab.reproduce.scalars import Scalars
from midl.lab.reproduce.state import FINISHED, read_finished
from midl.lab.training import Recipe, seed_for, train
from midl.serialization import save

__all__ = ["MODEL", "clear", "execute"]

MODEL = "model.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
# Of the training rows as many as give the training accuracy to a tenth of a point or so.
_TRAIN_ROWS = 10_000

OnStep = Callable[[int, int], None]


def execute(task: Task, out: Path, on_step: OnStep = lambda step, steps: None) -> dict[str, Any]:
    """Run a task in its folder below ``out``, whose lock the caller holds, and return what it wrote last.

    With several processes all call this; the first one measures and writes, the others return an empty dict.

    Raises:
        MIDLError: the training diverged, a file is damaged, or the method misses its FLOPs ratio.
    """
    folder = out / task.folder
    job = _Job(task, out, folder, setting_for(task.spec["dataset"], profile_named(task.spec["profile"]).rows), on_step)
    earlier = read_finished(folder, task.kind)
    if earlier is not None:
        finished = job.measure_again(earlier) if job.leads else {}
    elif task.kind == "tuning":
        finished = job.tune()
    else:
        finished = job.run()
    if not job.leads:
        return {}
    # What killed processes left half written; run.json another process may be writing now, the rest is ours alone.
    for half in folder.glob(".*.*"):
        if not half.name.startswith(".run.json."):
            half.unlink(missing_ok=True)
    write_json(folder / FINISHED[task.kind], finished)
    clear(folder)
    return finished


def clear(folder: Path) -> None:
    """Remove from a finished task's folder what only an unfinished one needs."""
    for leftover in (*folder.glob(f"*{_CHECKPOINT}"), folder / "failure.json"):
        leftover.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A task with everything it needs to run."""

    task: Task
    out: Path
    folder: Path
    setting: Setting
    on_step: OnStep

    @property
    def leads(self) -> bool:
        """Whether this process measures and writes."""
        return accelerator().is_main_process

    @property
    def method(self) -> Method:
        return find(self.task.spec["method"])

    def run(self) -> dict[str, Any]:
        """Train with the tuned recipe, score and measure."""
        spec = self.task.spec
        tuned = json.loads((self.out / self.task.tuning / FINISHED["tuning"]).read_text())["tuned"]
        recipe = dataclasses.replace(self.task.recipe, **tuned)
        dataset = vary(self.setting.dataset, spec["train_fraction"], spec["label_noise"], spec["seed"])
        model = self._build(spec["seed"], dataset)
        dense_flops = self._check_ratio(model)
        before = measure_accuracy(model, dataset)[0] if self.method.teacher and self.leads else None
        log = self._train(model, dataset, recipe, spec["seed"])
        if not self.leads:
            return {}
        started = time.perf_counter()
        accuracy, fraction_active = measure_accuracy(model, dataset)
        rows = rows_for_all(dataset.train.y, _TRAIN_ROWS)
        shown = Split(dataset.train.x[rows], dataset.train.y[rows])
        active, neurons = count_neurons(model, self.setting.architecture.layer_names, fraction_active)
        inputs, labels = dataset.batch(dataset.train, slice(0, recipe.batch_size))
        save(model, self.folder / MODEL)
        return {
            "version": RESULTS_VERSION,
            "spec": {**spec, "tuned": tuned},
            "environment": _environment(),
            "accuracy": accuracy,
            "train_accuracy": measure_accuracy(model, dataset, shown)[0],
            "accuracy_before_distillation": before,
            "losses": [entry["loss"] for entry in log],
            "seconds": round(sum(entry["seconds"] for entry in log), 3),
            "flops": self.method.flops(model, self.setting.architecture),
            "dense_flops": dense_flops,
            "active_neurons": active,
            "neurons": neurons,
            "fraction_active": fraction_active,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "saved_bytes": saved_bytes(model, inputs) / len(inputs),
            "peak_bytes": peak_bytes(model, inputs, labels),
            **self._measure(model, dataset),
            "measure_seconds": round(time.perf_counter() - started, 3),
        }

    def measure_again(self, finished: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a finished run with the measures of today."""
        model = methods.load(self.method, self.setting.architecture, self.setting.budget, self.folder / MODEL)
        return finished | self._measure(model, self.setting.dataset)

    def _measure(self, model: nn.Module, dataset: Dataset) -> dict[str, Any]:
        rows = profile_named(self.task.spec["profile"]).measured_rows
        return {"measures_version": MEASURES_VERSION, "measures": measure_all(model, dataset, rows=rows)}

    def tune(self) -> dict[str, Any]:
        """Train once per point of the grid, score on held-out training rows and keep the best model."""
        grid = profile_named(self.task.spec["profile"]).grid_for(self.task.spec["dataset"])
        dataset = self.setting.dataset
        if grid.rows < 1:
            dataset = dataset.subset(grid.rows, seed=0)
        dataset = dataset.hold_out()
        record = self.folder / "points.json"
        points: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
        start = self._build(0, dataset)
        for factor, decay in grid.points[len(points) :]:
            recipe = dataclasses.replace(
                self.task.recipe, lr=self.task.recipe.lr * factor, weight_decay=decay
            )  # fmt: skip
            model = copy.deepcopy(start)
            log = self._train(model, dataset, recipe, 0, f"{len(points)}.")
            if not self.leads:
                points.append({})
                continue
            point = {
                "lr": recipe.lr,
                "weight_decay": decay,
                "accuracy": measure_accuracy(model, dataset)[0],
                "loss": log[-1]["loss"],
                "seconds": round(sum(entry["seconds"] for entry in log), 3),
            }
            # The model of an equally good later point replaces nothing, so a kill between the two writes does no harm.
            if all(point["accuracy"] > other["accuracy"] for other in points):
                save(model, self.folder / MODEL)
            points.append(point)
            write_json(record, points)
        if not self.leads:
            return {}
        best = max(points, key=lambda point: point["accuracy"])
        return {
            "version": RESULTS_VERSION,
            "spec": self.task.spec,
            "environment": _environment(),
            "points": points,
            "tuned": {"lr": best["lr"], "weight_decay": best["weight_decay"]},
            "seconds": round(sum(point["seconds"] for point in points), 3),
        }

    def _build(self, seed: int, dataset: Dataset) -> nn.Module:
        """Return the untrained model, fitted to training rows where the method does that."""
        architecture, budget = self.setting.architecture, self.setting.budget
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, -1))
            model = self.method.build(architecture, budget, self._teacher())
        if self.method.fit is not None:
            rows = profile_named(self.task.spec["profile"]).fit_rows
            inputs = dataset.batch(dataset.train, rows_for_all(dataset.train.y, rows))[0]
            self.method.fit(model, architecture, budget, inputs.split(256))
        return model

    def _teacher(self) -> nn.Module | None:
        """Return the trained dense network, a new copy each time."""
        folder = self.task.teacher
        if folder is None:
            return None
        return methods.load(find("dense"), self.setting.architecture, self.setting.budget, self.out / folder / MODEL)

    def _train(
        self, model: nn.Module, dataset: Dataset, recipe: Recipe, seed: int, prefix: str = ""
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Train and return the log; ``prefix`` tells the files of several trainings in one folder apart."""
        log: list[dict[str, Any]] = []
        scalars = Scalars(self.folder / "tensorboard" / prefix)

        def keep(entries: list[dict[str, Any]]) -> None:
            log[:] = entries
            if self.leads:
                write_text(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
                scalars.write(entries)

        teacher, loss = self._teacher(), None
        if teacher is not None:
            kd_ratio = recipes_for(self.task.spec["dataset"]).kd_ratio
            loss = distillation_loss(teacher, kd_ratio=kd_ratio, label_smoothing=recipe.label_smoothing)
        train(
            model, dataset, recipe, seed=seed, loss=loss,
            checkpoint=self.folder / f"{prefix}{_CHECKPOINT}", before_step=self.method.before_step,
            on_step=self.on_step, on_epoch=keep,
        )  # fmt: skip
        scalars.close()
        if self.method.settle is not None:
            self.method.settle(model, self.setting.budget)
        return log

    def _check_ratio(self, model: nn.Module) -> int:
        """Return the dense network's FLOPs.

        Raises:
            MIDLError: the method claims to save FLOPs and does not.
        """
        architecture = self.setting.architecture
        with torch.random.fork_rng(devices=[]):
            dense = count_flops(architecture.build(), architecture.example())
        flops = self.method.flops(model, architecture)
        if self.method.meets_ratio and flops * NETWORK_RATIO > dense:
            raise MIDLError(
                f"reproduce: {self.method.name} needs {flops} FLOPs of the dense network's {dense}, expected at least "
                f"{NETWORK_RATIO} times fewer"
            )
        return dense


def vary(dataset: Dataset, train_fraction: float, label_noise: float, seed: int) -> Dataset:
    """Return a data set with a part of the training rows, or with random labels in place of a part of theirs."""
    if train_fraction < 1:
        dataset = dataset.subset(train_fraction, seed=seed)
    if label_noise:
        dataset = dataset.corrupt_labels(label_noise, seed=seed)
    return dataset


@functools.cache
def _environment() -> dict[str, Any]:
    return describe_environment()
