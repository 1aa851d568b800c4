"""The recipe of each data set: how long, how fast and in which batches its networks train, whatever the method."""

from __future__ import annotations

import dataclasses

import torch

from midl.lab.training import Recipe

__all__ = ["Recipes", "active_for", "group_size_for", "recipes_for", "threads_for"]


@dataclasses.dataclass(frozen=True)
class Recipes:
    """How long and how fast each phase trains: the same for all methods, and a brief one for distillation.

    Args:
        train: of networks that learn the labels.
        distill: of those that learn the answers of a dense network.
        kd_ratio: share of the teacher's answers in what they learn; the labels have the rest.
    """

    train: Recipe
    distill: Recipe
    kd_ratio: float = 1.0


_RECIPES = {
    "digits": Recipes(Recipe(epochs=20, batch_size=32), Recipe(epochs=5, batch_size=32, lr=3e-4)),
    "mnist": Recipes(Recipe(epochs=8), Recipe(epochs=2, lr=3e-4)),
    "adult": Recipes(Recipe(epochs=8), Recipe(epochs=2, lr=3e-4)),
    # From the second epoch on the Transformer learns its reviews by heart: held-out accuracy falls.
    "imdb": Recipes(
        Recipe(epochs=1, batch_size=64, lr=1.5e-3, weight_decay=0.1), Recipe(epochs=1, batch_size=64, lr=5e-4)
    ),
}
# For photographs, and for whatever else has no recipe of its own. Here 12 epochs leave something to learn from the
# labels, elsewhere they teach little but the training rows.
_RECIPES_ELSEWHERE = Recipes(
    Recipe(epochs=12, lr=4e-3, weight_decay=0.05, label_smoothing=0.1),
    Recipe(epochs=2, lr=1e-3, label_smoothing=0.1),
    kd_ratio=0.5,
)
# Networks so small that a second thread only waits for the first.
_THREADS = {"digits": 1, "adult": 1}
# Groups as narrow as a vector keep the Transformer from being faster than dense.
_GROUP_SIZE = {"digits": 8, "imdb": 32}
# With 0.45 the Transformer's narrow layers would have 2 of 4 groups active, all its layers 47 % of the neurons.
# On mnist it would be 29 of 64 groups, 45.3 %.
_ACTIVE = {"imdb": 0.37, "mnist": 0.4375}


def recipes_for(dataset: str, epochs: int | None = None) -> Recipes:
    """Return the recipes of a data set; ``epochs`` overrides the training's and scales the distillation's.

    >>> recipes_for("mnist", epochs=4).distill.epochs
    1
    """
    recipes = _RECIPES.get(dataset, _RECIPES_ELSEWHERE)
    if epochs is None:
        return recipes
    distill = max(1, round(recipes.distill.epochs * epochs / recipes.train.epochs))
    return dataclasses.replace(
        recipes,
        train=dataclasses.replace(recipes.train, epochs=epochs),
        distill=dataclasses.replace(recipes.distill, epochs=distill),
    )


def threads_for(dataset: str) -> int:
    """Return how many threads training on a data set uses by default: torch's, or 1 for small networks.

    >>> threads_for("digits")
    1
    """
    return _THREADS.get(dataset, torch.get_num_threads())


def group_size_for(dataset: str) -> int:
    """Return how many neurons are selected together on a data set by default: more where layers are wide.

    >>> group_size_for("mnist")
    16
    """
    return _GROUP_SIZE.get(dataset, 16)


def active_for(dataset: str) -> float:
    """Return which fraction of a layer's neurons is active on a data set by default: 0.45, less where that would be
    more once rounded to whole groups.

    >>> active_for("adult")
    0.45
    """
    return _ACTIVE.get(dataset, 0.45)
