"""What a study works on: a data set, an architecture, and its dense networks, trained once per seed and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

import midl
from midl.adaptation import soft_cross_entropy
from midl.errors import MIDLError
from midl.lab.data import Dataset
from midl.lab.models import MLP, VGG, Architecture, ResNet, architecture_for
from midl.lab.recipes import Recipes, recipes_for
from midl.lab.training import train

__all__ = ["Subject", "distillation", "subject_for"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A data set with the architecture that is trained on it.

    Args:
        name: of files and tables.
        dataset: to train and score on.
        architecture: of the dense network.
        learnt_like: the data set whose recipe trains it.
        epochs: of the dense training, instead of the recipe's.
        further: epochs of the dense training after a restart at a quarter of the recipe's learning rate.
    """

    name: str
    dataset: Dataset
    architecture: Architecture
    learnt_like: str
    epochs: int | None = None
    further: int = 0

    def recipes(self, epochs: int | None = None) -> Recipes:
        """Return how the networks are trained; ``epochs`` as in :func:`midl.lab.recipes.recipes_for`."""
        return recipes_for(self.learnt_like, epochs)

    def train_dense(self, seed: int, folder: Path) -> nn.Module:
        """Return the dense network, trained by the data set's recipe; a second call loads what the first one saved.

        Args:
            seed: of initialisation and training.
            folder: where the network is kept, and the checkpoint of a training under way.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.architecture.build()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}-dense-seed{seed}.safetensors"
        if file.exists():
            return midl.load_(model, file).eval()
        recipe = self.recipes(self.epochs).train
        rounds = [recipe]
        if self.further:
            rounds.append(dataclasses.replace(recipe, epochs=self.further, lr=recipe.lr / 4, warmup=0.0))
        checkpoints = [file.with_name(f"{file.stem}-checkpoint{i}.safetensors") for i in range(len(rounds))]
        for i, (part, checkpoint) in enumerate(zip(rounds, checkpoints, strict=True)):
            train(model, self.dataset, part, seed=seed + 1000 * i, checkpoint=checkpoint)
        midl.save(model, file)
        for checkpoint in checkpoints:
            checkpoint.unlink(missing_ok=True)
        return model.eval()


def subject_for(dataset: Dataset, model: str | None = None) -> Subject:
    """Return the data set with its own architecture, with ``"mlp"``, ``"cnn"`` or ``"vgg"``.

    ``"mlp"`` has two hidden layers of 1024; ``"cnn"`` is the lab's ResNet in widths that groups of 32 divide, just wide
    enough for its data; ``"vgg"`` is a plain CNN with more neurons than it needs.

    >>> from midl.lab.data import load
    >>> subject_for(load("digits"), "mlp").architecture.layer_names
    ['hidden1', 'hidden2']

    Raises:
        MIDLError: unknown model.
    """
    if model is None:
        architecture = architecture_for(dataset.name, dataset.input_shape, dataset.num_classes)
        return Subject(dataset.name, dataset, architecture, dataset.name)
    if model in ("cnn", "vgg") and dataset.input_shape == (3, 32, 32):
        resnet = ResNet(dataset.num_classes, widths=(16, 32, 64, 160))
        network = resnet if model == "cnn" else VGG(dataset.num_classes)
        return Subject(f"{dataset.name}-{model}", dataset, network, dataset.name)
    if model != "mlp":
        raise MIDLError(
            f"subject_for: model={model!r}, expected 'mlp', None or, for images of 3 x 32 x 32, 'cnn' or 'vgg'"
        )
    inputs = torch.Size(dataset.input_shape).numel()
    mlp = MLP(inputs, (1024, 1024), dataset.num_classes)
    return Subject(f"{dataset.name}-mlp", dataset, mlp, "mnist")


def distillation(recipes: Recipes) -> dict[str, Any]:
    """Return the arguments of :func:`midl.adaptation.distil` that say how fast and from what to learn."""
    choices: dict[str, Any] = {"lr": recipes.distill.lr, "loss": soft_cross_entropy()}
    if recipes.kd_ratio < 1:
        choices["kd_ratio"] = recipes.kd_ratio
        choices["task_loss"] = nn.CrossEntropyLoss(label_smoothing=recipes.distill.label_smoothing)
    return choices
