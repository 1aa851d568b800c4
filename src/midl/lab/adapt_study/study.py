"""One run of the study: train dense, adapt to every budget and group size, score what was trained and what was not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.adaptation import adapt, distil
from midl.adaptation.calibrate import weight_of
from midl.errors import MIDLError
from midl.lab.adapt_study.batches import ShuffledBatches
from midl.lab.adapt_study.low_rank import factorise
from midl.lab.adapt_study.oracle import select_by_oracle
from midl.lab.data import Dataset
from midl.lab.measure import measure_accuracy, measure_latency
from midl.lab.models import MLP, architecture_for
from midl.lab.training import Recipe, train

__all__ = ["Row", "Settings", "run_study"]

_CALIBRATION = 4096


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run: ``distil_epochs`` is at most a fifth of ``epochs`` in what the docs report."""

    budgets: tuple[float, ...] = (1.7, 2.5)
    group_sizes: tuple[int, ...] = (1, 16, 32)
    epochs: int = 8
    distil_epochs: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted network. Accuracies are test accuracies in percent.

    Attributes:
        dense: of the dense network.
        low_rank: of all hidden layers factorised at the same budget, fitted to real inputs, no training.
        plain: of ``convert_`` with the weight's SVD and the light gate, the same budget in every layer, no training.
        adapted: of ``midl.adapt`` without training.
        oracle: of that network with the best selection.
        distilled: of that network after distillation.
        low_rank_distilled: of ``low_rank`` after the same distillation.
        latency: median seconds of a batch of 128, dense and adapted, interleaved.
        layers: active, rank, gate, captured and oracle energy per layer.
    """

    budget: float
    group_size: int
    flops_ratio: float
    dense: float
    low_rank: float
    low_rank_distilled: float
    plain: float
    adapted: float
    oracle: float
    distilled: float
    latency: dict[str, float]
    layers: list[dict[str, Any]]


def run_study(dataset: Dataset, settings: Settings, on_row: Callable[[Row], None]) -> list[Row]:
    """Return a row per budget and group size; ``on_row`` is called as each is done."""
    architecture = architecture_for(dataset.name, dataset.input_shape, dataset.num_classes)
    if not isinstance(architecture, MLP):  # the oracle looks one ReLU ahead
        raise MIDLError(f"adapt_study: dataset={dataset.name!r} has a {type(architecture).__name__}, expected an MLP")
    torch.manual_seed(settings.seed)
    dense = architecture.build()
    train(dense, dataset, Recipe(epochs=settings.epochs), seed=settings.seed)
    dense.eval()
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(settings.seed))
    batches = [dataset.batch(dataset.train, rows)[0].flatten(1) for rows in order[:_CALIBRATION].split(128)]
    rows = []
    for budget in settings.budgets:
        low_rank = copy.deepcopy(dense)
        factorise(low_rank, architecture.layer_names, batches, budget)
        before = measure_accuracy(low_rank, dataset)[0]
        distil(
            low_rank, dense, ShuffledBatches(dataset, settings.seed), epochs=settings.distil_epochs, seed=settings.seed
        )
        factorised = (before, measure_accuracy(low_rank, dataset)[0])
        for group_size in settings.group_sizes:
            rows.append(_row(dense, architecture, dataset, batches, budget, group_size, factorised, settings))
            on_row(rows[-1])
    return rows


def _row(
    dense: nn.Sequential,
    architecture: MLP,
    dataset: Dataset,
    batches: Sequence[Tensor],
    budget: float,
    group_size: int,
    low_rank: tuple[float, float],
    settings: Settings,
) -> Row:
    model = copy.deepcopy(dense)
    report = adapt(model, batches, budget, group_size=group_size, samples=_CALIBRATION, seed=settings.seed)
    adapted = measure_accuracy(model, dataset)[0]
    with select_by_oracle(model):
        oracle = measure_accuracy(model, dataset)[0]
    latency = measure_latency({"dense": dense, "adapted": model}, batches[0])
    distil(model, dense, ShuffledBatches(dataset, settings.seed), epochs=settings.distil_epochs, seed=settings.seed)
    return Row(
        budget, group_size, report.flops_ratio, measure_accuracy(dense, dataset)[0], *low_rank,
        _plain(dense, architecture, dataset, budget, group_size), adapted, oracle, measure_accuracy(model, dataset)[0],
        {name: times["median"] for name, times in latency.items()},
        [dataclasses.asdict(layer) for layer in report.layers],
    )  # fmt: skip


def _plain(dense: nn.Sequential, architecture: MLP, dataset: Dataset, budget: float, group_size: int) -> float:
    """Return the accuracy of a conversion without data: every hidden layer the same ratio, 45 % active at 1.7x."""
    model = copy.deepcopy(dense)
    total = midl.count_flops(dense, architecture.example())
    hidden = 2 * sum(weight_of(dense.get_submodule(name)).numel() for name in architecture.layer_names)
    ratio = hidden / (total / budget - (total - hidden))
    config = midl.MIDConfig(
        active=0.45 * 1.7 / ratio, flops_ratio=ratio, group_size=group_size, gate="light", interpolation="hard"
    )
    midl.convert_(model, config, overrides=dict.fromkeys(architecture.layer_names, config) | {"head": None})
    return measure_accuracy(model, dataset)[0]
