"""The ablation that decides the library's defaults: one choice changed at a time, from scratch and converted."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import midl
from midl.adaptation.calibrate import weight_of
from midl.errors import MIDLError
from midl.lab.adapt_study.subject import Subject
from midl.lab.distillation import distillation_loss
from midl.lab.files import write_json
from midl.lab.measure import measure_accuracy
from midl.lab.training import train
from midl.layers import MIDLayer

__all__ = ["VARIANTS", "Variant", "run_ablation"]

_BASE: dict[str, Any] = {"active": 0.45, "group_size": 16, "gate": "projection", "interpolation": "sigmoid"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One change to the base: projection gate, sigmoid, selected straight-through, SVD start, groups of 16, labels.

    Args:
        choices: fields of :class:`midl.MIDConfig` that differ.
        start: ``"svd"`` or ``"random"`` light path and gate.
        anneal: let ``active`` fall from 1 to its value over the first half of the training.
        teacher: learn the trained dense network's answers instead of the labels.
    """

    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = "svd"
    anneal: bool = False
    teacher: bool = False


VARIANTS: dict[str, Variant] = {
    "base": Variant(),
    "gate=light": Variant({"gate": "light"}),
    "interpolation=hard": Variant({"interpolation": "hard"}),
    "gate=light, interpolation=hard": Variant({"gate": "light", "interpolation": "hard"}),
    "ste=dense": Variant({"ste": "dense"}),
    "noise=1": Variant({"noise": 1.0}),
    "random start": Variant(start="random"),
    "annealed active": Variant(anneal=True),
    "distilled": Variant(teacher=True),
    "group_size=1": Variant({"group_size": 1}),
    "group_size=4, span=4": Variant({"group_size": 4, "span": 4}),
    "group_size=32": Variant({"group_size": 32}),
}


def run_ablation(
    subject: Subject,
    seed: int,
    folder: Path,
    *,
    mode: str = "scratch",
    epochs: int | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train every variant with one seed and return a row each; finished ones are taken from ``folder``.

    Args:
        subject: data set and architecture.
        seed: of initialisation, order and noise.
        folder: of ``<subject>-<mode>-ablation-seed<seed>.json`` and the trained dense networks.
        mode: ``"scratch"``, or ``"converted"``: starts from the trained dense network.
        epochs: of each variant; ``None`` for the recipe's of that mode.
        on_row: called with each row as it is done.

    Raises:
        MIDLError: unknown mode.
    """
    if mode not in ("scratch", "converted"):
        raise MIDLError(f"run_ablation: mode={mode!r}, expected 'scratch' or 'converted'")
    file = folder / f"{subject.name}-{mode}-ablation-seed{seed}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    dataset = subject.dataset
    dense = subject.train_dense(seed, folder)
    for name, variant in VARIANTS.items():
        if any(row["variant"] == name for row in rows):
            continue
        model = _build(subject, dense, variant, mode, seed)
        if model is None:
            continue
        before = measure_accuracy(model, dataset)[0]
        recipes = subject.recipes(epochs if mode == "scratch" else None)
        recipe = recipes.train if mode == "scratch" else recipes.distill
        if mode == "converted" and epochs is not None:
            recipe = dataclasses.replace(recipe, epochs=epochs)
        loss = distillation_loss(dense) if variant.teacher else None
        train(model, dataset, recipe, seed=seed, loss=loss, on_step=_annealing(model) if variant.anneal else _nothing)
        rows.append(
            {
                "variant": name,
                "mode": mode,
                "dataset": subject.name,
                "seed": seed,
                "epochs": recipe.epochs,
                "dense": measure_accuracy(dense, dataset)[0],
                "before": before,
                "accuracy": measure_accuracy(model, dataset)[0],
            }
        )
        write_json(file, rows)
        on_row(rows[-1])
    return rows


def _nothing(step: int, steps: int) -> None:
    pass


def _build(subject: Subject, dense: nn.Module, variant: Variant, mode: str, seed: int) -> nn.Module | None:
    """Return the untrained model of a variant, or None where its span has no positions to run over.

    A layer with a single group has nothing to choose from and stays dense.
    """
    architecture = subject.architecture
    config = midl.MIDConfig(**(_BASE | variant.choices))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(dense) if mode == "converted" else architecture.build()
        names = [
            name
            for name in architecture.layer_names
            if weight_of(dense.get_submodule(name)).shape[0] > config.group_size
        ]
        if config.span > 1 and any(isinstance(model.get_submodule(name), nn.Linear) for name in names):
            return None
        midl.convert_(model, config, filter_fn=lambda m, name: name in names, overrides=dict.fromkeys(names, config))
        if variant.start == "random":
            for layer in model.modules():
                if isinstance(layer, MIDLayer):
                    _randomise(layer)
    return model


@torch.no_grad()
def _randomise(layer: MIDLayer) -> None:
    """Draw light path and gate as torch draws the weights of such layers."""
    nn.init.kaiming_uniform_(layer.light_down, a=5**0.5)
    nn.init.kaiming_uniform_(layer.light_up, a=5**0.5)
    if layer.gate_weight is not None and layer.gate_bias is not None:
        nn.init.kaiming_uniform_(layer.gate_weight, a=5**0.5)
        nn.init.zeros_(layer.gate_bias)


def _annealing(model: nn.Module) -> Callable[[int, int], None]:
    layers = [m for m in model.modules() if isinstance(m, MIDLayer)]
    ends = [layer.active for layer in layers]
    for layer in layers:
        layer.active = 1.0

    def step(done: int, steps: int) -> None:
        part = min(1.0, 2 * done / steps)
        for layer, end in zip(layers, ends, strict=True):
            layer.active = 1.0 + part * (end - 1.0)

    return step
