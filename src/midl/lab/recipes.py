"""The recipe of each data set: how long, how fast and in which batches its networks train, whatever the method."""

from __future__ import annotations

import dataclasses

import torch

from midl.lab.training import Recipe

__all__ = ["Recipes", "group_size_for", "recipes_for", "threads_for"]


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
    """Return how many threads training on a data set uses by default: torch's, or 1 for small networks.

    >>> threads_for("digits")
    1
    """
    return _THREADS.get(dataset, torch.get_num_threads())


def group_size_for(dataset: str) -> int:
    """Return how many neurons are selected together on a data set by default: fewer in narrow layers.

    >>> group_size_for("mnist")
    16
    """
    return _GROUP_SIZE.get(dataset, 16)
