"""The four ways to spend FLOPs that ``midl compare`` sets side by side, and the recipe of each data set."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from midl.analysis import count_flops
from midl.config import MIDConfig
from midl.conversion import convert_
from midl.lab.models import Architecture
from midl.lab.training import Recipe

__all__ = ["METHODS", "TITLES", "Method", "Recipes", "build", "check_fit", "mid_config", "recipes_for", "threads_for"]

Method = str
METHODS: tuple[Method, ...] = ("dense", "narrow", "scratch", "converted")
TITLES = {"dense": "dense", "narrow": "dense narrowed", "scratch": "MID-L scratch", "converted": "MID-L converted"}

# The paper's formula: on held-out MNIST rows hard interpolation and the light gate differed from it by less than seeds.
_SCRATCH: dict[str, Any] = {"gate": "projection", "interpolation": "sigmoid", "ste": "selected"}
# The light path of a trained weight ranks its groups well without training, and with hard interpolation a converted
# layer starts as close to the dense one as its selection allows.
_CONVERTED: dict[str, Any] = {"gate": "light", "interpolation": "hard", "ste": "selected"}


@dataclasses.dataclass(frozen=True)
class Recipes:
    """How long and how fast each phase trains: the same for all methods, and a brief one for distillation."""

    train: Recipe
    distill: Recipe


_EPOCHS = {"digits": (20, 5), "mnist": (8, 2), "adult": (8, 2)}
_BATCH_SIZE = {"digits": 32, "mnist": 128, "adult": 128}
# Networks so small that a second thread only waits for the first.
_THREADS = {"digits": 1, "adult": 1}
_GROUP_SIZE = {"digits": 8}


def recipes_for(dataset: str, epochs: int | None = None) -> Recipes:
    """Return the recipes of a data set; ``epochs`` overrides the training's and scales the distillation's.

    >>> recipes_for("mnist", epochs=4).distill.epochs
    1
    """
    default, distill = _EPOCHS.get(dataset, (8, 2))
    batch_size = _BATCH_SIZE.get(dataset, 128)
    if epochs is not None:
        distill = max(1, round(distill * epochs / default))
    return Recipes(
        Recipe(epochs=default if epochs is None else epochs, batch_size=batch_size),
        Recipe(epochs=distill, batch_size=batch_size, lr=3e-4),
    )


def threads_for(dataset: str) -> int:
    """Return how many threads a comparison on a data set uses by default: torch's, or 1 for small networks.

    >>> threads_for("digits")
    1
    """
    return _THREADS.get(dataset, torch.get_num_threads())


def group_size_for(dataset: str) -> int:
    """Return how many neurons a comparison on a data set selects together by default: fewer in narrow layers.

    >>> group_size_for("mnist")
    16
    """
    return _GROUP_SIZE.get(dataset, 16)


def mid_config(method: Method, active: float, group_size: int) -> MIDConfig:
    """Return the layers' configuration of a MID-L method."""
    choices = _SCRATCH if method == "scratch" else _CONVERTED
    return MIDConfig(active=active, group_size=group_size, **choices)


def check_fit(architecture: Architecture, active: float, group_size: int) -> None:
    """Raise, before anything is trained, unless every method's layers fit the architecture.

    Raises:
        MIDLError: sizes or a budget that the layers cannot meet.
    """
    for method in ("scratch", "converted"):
        with torch.random.fork_rng(devices=[]):
            build(method, architecture, active=active, group_size=group_size)


def build(
    method: Method, architecture: Architecture, *, active: float, group_size: int, dense: nn.Module | None = None
) -> nn.Module:
    """Return the untrained model of a method; its weights follow from torch's random state.

    Args:
        method: one of ``METHODS``.
        architecture: the dense one; the head stays dense in every method.
        active: fraction of groups on the full path.
        group_size: neurons per group.
        dense: for ``"converted"``, the trained model, which is converted in place; a fresh one if not given.

    Raises:
        MIDLError: sizes or a budget that the layers cannot meet.
    """
    if method == "dense":
        return architecture.build()
    if method == "narrow":
        with torch.random.fork_rng(devices=[]):  # only counted, never run
            scratch = build("scratch", architecture, active=active, group_size=group_size)
        flops = count_flops(scratch, architecture.example())
        return architecture.narrow(flops).build()
    config = mid_config(method, active, group_size)
    model = dense if dense is not None else architecture.build()
    names = architecture.layer_names
    # Named one by one, so that a layer the configuration does not fit is an error and not left dense.
    convert_(model, config, filter_fn=lambda module, name: name in names, overrides=dict.fromkeys(names, config))
    return model
