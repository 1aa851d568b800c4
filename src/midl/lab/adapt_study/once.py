"""One adaptation of one network: what ``midl adapt`` and ``midl curve`` run."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.adaptation.adapt import check_max_active
from midl.config import check_positive_int
from midl.errors import MIDLError
from midl.lab.adapt_study.batches import ShuffledBatches
from midl.lab.adapt_study.subject import distillation
from midl.lab.curve import Point, measure_curve, plot_curve
from midl.lab.data import Dataset, load
from midl.lab.environment import describe_environment
from midl.lab.files import write_json
from midl.lab.measure import measure_accuracy, measure_latency
from midl.lab.models import architecture_for
from midl.lab.recipes import recipes_for
from midl.lab.training import train

__all__ = ["AdaptSettings", "adapt_once", "draw_curve"]

_LATENCY_BATCHES = (1, 64)


@dataclasses.dataclass(frozen=True)
class AdaptSettings:
    """What to adapt; the fields are the options of ``midl adapt`` and ``midl curve``."""

    dataset: str
    budget: float = 1.7
    group_size: int = 16
    epochs: int | None = None
    distil_epochs: int = 1
    seed: int = 0
    threads: int | None = None
    model: str | None = None
    latency_batch: int | None = None
    threshold: bool = False
    max_active: float | None = None

    def __post_init__(self) -> None:
        # What adapt would find out only after the dense network is trained.
        if not 1 < self.budget < math.inf:
            raise MIDLError(f"budget={self.budget!r}, expected a ratio above 1")
        for name in ("group_size", "epochs", "threads", "latency_batch"):
            if getattr(self, name) is not None:
                check_positive_int("adapt", name, getattr(self, name))
        check_max_active(self.max_active)


def adapt_once(settings: AdaptSettings, out: Path, checkpoint: Path | None = None) -> Iterator[str]:
    """Train or load a dense network, adapt it, write both, a report and a plot to ``out``; yield lines for the console.

    Raises:
        MIDLError: a data set, model factory, checkpoint or budget that cannot be had.
    """
    dataset, dense = _dense(settings, out, checkpoint)
    model = copy.deepcopy(dense)
    served = settings.latency_batch
    report = midl.adapt(
        model, ShuffledBatches(dataset, settings.seed), settings.budget, group_size=settings.group_size,
        latency_inputs=None if served is None else _inputs(dataset, served), max_active=settings.max_active,
        epochs=settings.distil_epochs, threshold=settings.threshold, seed=settings.seed,
        **distillation(recipes_for(settings.dataset)),
    )  # fmt: skip
    midl.save(model, out / "adapted.safetensors")
    yield str(report)
    accuracy = {"dense": measure_accuracy(dense, dataset)[0], "adapted": measure_accuracy(model, dataset)[0]}
    yield f"accuracy {accuracy['dense']:.2f} % dense, {accuracy['adapted']:.2f} % adapted"
    latency = {}
    for batch in _LATENCY_BATCHES:
        x = dataset.batch(dataset.test, slice(0, batch))[0]
        latency[batch] = measure_latency({"dense": dense, "adapted": model}, x)
        before, after = (latency[batch][name]["median"] for name in ("dense", "adapted"))
        yield f"latency at batch {batch}: {1e6 * before:.0f} us dense, {1e6 * after:.0f} us adapted"
    result = {
        "settings": dataclasses.asdict(settings), "environment": describe_environment(),
        "report": dataclasses.asdict(report), "accuracy": accuracy, "latency": latency,
    }  # fmt: skip
    write_json(out / "report.json", result)
    points = measure_curve(model, dense, dataset, (0.15, 0.3, 0.45, 0.7, 1.0), batches=())
    plot_curve(points, accuracy["dense"], f"{dataset.name}, adapted to {settings.budget:g}x", out / "accuracy.png")
    yield f"Folder: {out}"


def draw_curve(
    settings: AdaptSettings, budgets: tuple[float, ...], out: Path, checkpoint: Path | None = None
) -> Iterator[str]:
    """Make one network serve all ``budgets``, measure it at each, write ``out``; yield lines for the console.

    Raises:
        MIDLError: a data set, model factory, checkpoint or budget that cannot be had.
    """
    for active in budgets:
        if not 0 < active <= 1:
            raise MIDLError(f"active={active!r}, expected fractions in (0, 1]")
    dataset, dense = _dense(settings, out, checkpoint)
    model = copy.deepcopy(dense)
    midl.adapt(
        model, ShuffledBatches(dataset, settings.seed), settings.budget, group_size=settings.group_size,
        allocation="uniform", epochs=settings.distil_epochs, elastic=(min(budgets), max(budgets)), seed=settings.seed,
        **distillation(recipes_for(settings.dataset)),
    )  # fmt: skip
    midl.save(model, out / "elastic.safetensors")
    accuracy = measure_accuracy(dense, dataset)[0]
    yield f"dense: {accuracy:.2f} %"
    yield "active   of dense's FLOPs   accuracy" + "".join(f"   batch {batch}" for batch in _LATENCY_BATCHES)
    points = []
    for point in measure_curve(model, dense, dataset, budgets, _LATENCY_BATCHES):
        points.append(point)
        yield _line(point)
    result = {
        "settings": dataclasses.asdict(settings), "environment": describe_environment(), "dense_accuracy": accuracy,
        "points": [dataclasses.asdict(point) for point in points],
    }  # fmt: skip
    write_json(out / "curve.json", result)
    plot_curve(points, accuracy, f"{dataset.name}, one elastic network", out / "curve.png")
    yield f"Folder: {out} (latencies are those of the dense network divided by the elastic one's: above 1 it is faster)"


def _line(point: Point) -> str:
    speeds = "".join(f"{point.latency_dense[b] / point.latency[b]:9.2f}x" for b in point.latency)
    return f"{point.active:6.0%}   {1 / point.flops_ratio:15.2f}x   {point.accuracy:6.2f} %{speeds}"


def _dense(settings: AdaptSettings, out: Path, checkpoint: Path | None) -> tuple[Dataset, nn.Module]:
    """Return the data set and its trained dense network, loaded or trained and saved."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dataset = load(settings.dataset)
    torch.manual_seed(settings.seed)
    if settings.model is None:
        model = architecture_for(dataset.name, dataset.input_shape, dataset.num_classes).build()
    else:
        model = _call_factory(settings.model)
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        train(model, dataset, recipes_for(settings.dataset, settings.epochs).train, seed=settings.seed)
        midl.save(model, out / "dense.safetensors")
    else:
        midl.load_(model, checkpoint)
    return dataset, model.eval()


def _inputs(dataset: Dataset, rows: int) -> Tensor:
    """Return so many training inputs, the first ones again where there are not as many."""
    return dataset.batch(dataset.train, torch.arange(rows) % len(dataset.train))[0]


def _call_factory(name: str) -> nn.Module:
    """Return what the function ``module:function`` makes."""
    module, _, function = name.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise MIDLError(f"model={name!r} cannot be imported ({error}), expected module:function") from error
    try:
        made = factory()
    except Exception as error:
        raise MIDLError(
            f"model={name!r} failed ({type(error).__name__}: {error}), expected a function without arguments that "
            "returns the network"
        ) from error
    if not isinstance(made, nn.Module):
        raise MIDLError(f"model={name!r} returned a {type(made).__name__}, expected torch.nn.Module")
    return made
