"""The main job: dense, dense narrowed, MID-L from scratch and dense converted, trained alike and measured alike."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from midl.analysis import count_flops
from midl.config import check_active, check_positive_int
from midl.errors import MIDLError
from midl.lab import data
from midl.lab.distillation import distillation_loss
from midl.lab.environment import describe_kernels, describe_machine
from midl.lab.files import write_json
from midl.lab.measure import layer_flops, measure_accuracy, measure_latency, saved_bytes
from midl.lab.methods import Budget, converted, find, load, scratch
from midl.lab.models import Architecture, architecture_for, describe
from midl.lab.recipes import Recipes, group_size_for, recipes_for, threads_for
from midl.lab.runs import RunFolder
from midl.lab.training import seed_for, train
from midl.serialization import save

__all__ = ["LATENCY_BATCHES", "METHODS", "Comparison", "Row", "Settings", "Watcher", "compare"]

METHODS = ("dense", "narrow", "scratch", "converted")
LATENCY_BATCHES = (1, 64)


class Watcher(Protocol):
    """Is told what goes on."""

    def begin(self, method: str, seed: int) -> None:
        """A run is about to train."""

    def step(self, done: int, total: int) -> None:
        """The run under way has done so many training steps."""

    def end(self, method: str, seed: int, accuracy: float) -> None:
        """A run is trained and scored, now or in an earlier start."""

    def measure(self) -> None:
        """All runs are trained; latency and memory are measured now."""


class _Silent:
    def begin(self, method: str, seed: int) -> None:
        pass

    def step(self, done: int, total: int) -> None:
        pass

    def end(self, method: str, seed: int, accuracy: float) -> None:
        pass

    def measure(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a comparison depends on.

    Args:
        dataset: name of a data set.
        seeds: one run of every method for each.
        epochs: of training; ``None`` for the data set's own. Distillation scales along.
        active: fraction of neuron groups on the full path.
        group_size: neurons selected together; ``None`` for the data set's own.
        threads: torch's; ``None`` for what it has, or 1 where the networks are too small to share.
        validation: score on a fifth of the training rows, held out, and leave the test rows alone: for choosing.

    Raises:
        MIDLError: a value outside its range; the message names it.
    """

    dataset: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    active: float = 0.45
    group_size: int | None = None
    threads: int | None = None
    validation: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise MIDLError(f"compare: seeds={self.seeds!r}, expected different integers of at least 0")
        for name in ("epochs", "threads", "group_size"):
            if getattr(self, name) is not None:
                check_positive_int("compare", name, getattr(self, name))
        check_active("compare", self.active)


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one method.

    Args:
        method: one of ``METHODS``.
        accuracies: percent, one per seed.
        active_neurons: hidden neurons that take the full path, mean over inputs and seeds.
        neurons: hidden neurons.
        flops: of the whole network, per input.
        hidden_flops: of the hidden layers, per input.
        parameters: of the whole network.
        saved_bytes: kept for the backward pass, per input of a training batch.
        latency: batch size to times and their ratio to dense (:func:`midl.lab.pairs.time_in_pairs`).
    """

    method: str
    accuracies: tuple[float, ...]
    active_neurons: float
    neurons: int
    flops: int
    hidden_flops: int
    parameters: int
    saved_bytes: float
    latency: dict[int, dict[str, float]]

    @property
    def accuracy(self) -> float:
        """Mean over the seeds, in percent."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds, in points; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of :func:`compare`."""

    settings: Settings
    recipes: Recipes
    folder: Path
    rows: dict[str, Row]


def compare(settings: Settings, out: Path, watcher: Watcher | None = None) -> Comparison:
    """Train every method with every seed, measure all and write a run folder below ``out``.

    Finished runs and epochs of an earlier start with the same settings are taken over. Seeds may be added later.

    Raises:
        MIDLError: settings that do not fit the model, an unknown data set, or a damaged run folder.
    """
    watcher = watcher or _Silent()
    dataset = data.load(settings.dataset)
    group_size = settings.group_size or group_size_for(settings.dataset)
    settings = dataclasses.replace(settings, group_size=group_size)
    if settings.validation:
        dataset = dataset.hold_out()
    architecture = architecture_for(settings.dataset, dataset.input_shape, dataset.num_classes)
    with _threads(settings.threads or threads_for(settings.dataset)):
        budget = Budget(settings.active, group_size)
        job = _Job(settings, budget, dataset, architecture, recipes_for(settings.dataset, settings.epochs))
        job.check_fit()
        with RunFolder(out, f"compare-{settings.dataset}", job.fingerprint()) as folder:
            for seed in settings.seeds:
                for method in METHODS:
                    job.run(method, seed, folder, watcher)
            watcher.measure()
            rows = job.rows(folder)
    return Comparison(settings, job.recipes, folder.path, rows)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A comparison with everything it needs to run."""

    settings: Settings
    budget: Budget
    dataset: data.Dataset
    architecture: Architecture
    recipes: Recipes

    def fingerprint(self) -> dict[str, Any]:
        """Return, as JSON values, what the results depend on; the seeds name runs inside the folder."""
        s = self.settings
        return {
            "dataset": s.dataset,
            "data": self.dataset.fingerprint,
            "architecture": describe(self.architecture),
            "recipes": dataclasses.asdict(self.recipes),
            "scratch": scratch.config(self.budget).to_dict(),
            "converted": converted.config(self.budget).to_dict(),
            "threads": torch.get_num_threads(),
        }

    def check_fit(self) -> None:
        """Raise, before anything is trained, unless MID-L's layers fit the architecture."""
        for method in ("scratch", "converted"):
            with torch.random.fork_rng(devices=[]):
                find(method).build(self.architecture, self.budget, None)

    def load(self, method: str, seed: int, folder: RunFolder) -> nn.Module:
        """Return a trained model."""
        return load(find(method), self.architecture, self.budget, folder.model(_run_name(method, seed)))

    def run(self, method: str, seed: int, folder: RunFolder, watcher: Watcher) -> None:
        """Train and score one method with one seed, unless that is done."""
        name = _run_name(method, seed)
        for result in folder.results():
            if result["run"] == name and folder.model(name).is_file():
                watcher.end(method, seed, result["accuracy"])
                return
        watcher.begin(method, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, -1))
            way = find(method)
            teacher = self.load("dense", seed, folder) if way.teacher else None
            model = way.build(self.architecture, self.budget, teacher)
            recipe = self.recipes.distill if way.teacher else self.recipes.train
            loss = None
            if way.teacher:
                loss = distillation_loss(
                    self.load("dense", seed, folder), kd_ratio=self.recipes.kd_ratio,
                    label_smoothing=recipe.label_smoothing,
                )  # fmt: skip
        zero_shot = measure_accuracy(model, self.dataset)[0] if way.teacher else None
        checkpoint = folder.checkpoint(name)
        losses = train(model, self.dataset, recipe, seed=seed, loss=loss, checkpoint=checkpoint, on_step=watcher.step)
        accuracy, activity = measure_accuracy(model, self.dataset)
        folder.model(name).parent.mkdir(exist_ok=True)
        save(model, folder.model(name))
        result = {
            "run": name, "method": method, "seed": seed, "accuracy": accuracy,
            "accuracy_before_distillation": zero_shot, "fraction_active": activity, "losses": losses,
        }  # fmt: skip
        folder.append(result)
        checkpoint.unlink(missing_ok=True)
        watcher.end(method, seed, accuracy)

    def rows(self, folder: RunFolder) -> dict[str, Row]:
        """Measure what does not need training, with the first seed's models, and put all together."""
        measured = self._measure(folder)
        results = {result["run"]: result for result in folder.results()}
        rows = {}
        for method in METHODS:
            runs = [results[_run_name(method, seed)] for seed in self.settings.seeds]
            widths = measured[method]["widths"]
            active = [sum(run["fraction_active"].get(n, 1.0) * w for n, w in widths.items()) for run in runs]
            rows[method] = Row(
                method=method,
                accuracies=tuple(run["accuracy"] for run in runs),
                active_neurons=statistics.fmean(active),
                neurons=sum(widths.values()),
                flops=measured[method]["flops"],
                hidden_flops=measured[method]["hidden_flops"],
                parameters=measured[method]["parameters"],
                saved_bytes=measured[method]["saved_bytes"],
                latency={batch: measured[method]["latency"][str(batch)] for batch in LATENCY_BATCHES},
            )
        return rows

    def _measure(self, folder: RunFolder) -> dict[str, Any]:
        models = {method: self.load(method, self.settings.seeds[0], folder) for method in METHODS}
        names, example = self.architecture.layer_names, self.architecture.example()
        batch = self.recipes.train.batch_size
        inputs = {rows: self.dataset.batch(self.dataset.test, slice(0, rows))[0] for rows in {*LATENCY_BATCHES, batch}}
        latency = {rows: measure_latency(models, inputs[rows]) for rows in LATENCY_BATCHES}
        measured = {
            method: {
                "widths": {name: model.get_submodule(name).weight.shape[0] for name in names},  # type: ignore[union-attr, index]
                "flops": count_flops(model, example),
                "hidden_flops": sum(layer_flops(model, example, names).values()),
                "parameters": sum(p.numel() for p in model.parameters()),
                "saved_bytes": saved_bytes(model, inputs[batch]) / len(inputs[batch]),
                "latency": {str(rows): latency[rows][method] for rows in LATENCY_BATCHES},
            }
            for method, model in models.items()
        }
        write_json(
            folder.path / "measurements.json",
            {"machine": describe_machine(), "kernels": describe_kernels(), "methods": measured},
        )
        return measured


def _run_name(method: str, seed: int) -> str:
    return f"{method}-seed{seed}"


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
