"""The dense network that a study starts from: trained once per data set and seed, kept in the study's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import midl
from midl.lab.data import Dataset
from midl.lab.models import architecture_for
from midl.lab.recipes import recipes_for
from midl.lab.training import train

__all__ = ["train_dense"]


def train_dense(dataset: Dataset, seed: int, folder: Path, epochs: int | None = None) -> nn.Module:
    """Return the data set's dense network, trained by its recipe; a second call loads what the first one saved.

    Args:
        dataset: what to train on.
        seed: of initialisation and training.
        folder: where the network is kept, and the checkpoint of a training under way.
        epochs: instead of the recipe's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture_for(dataset.name, dataset.input_shape, dataset.num_classes).build()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{dataset.name}-dense-seed{seed}.safetensors"
    if file.exists():
        return midl.load_(model, file).eval()
    checkpoint = file.with_name(f"{file.stem}-checkpoint.safetensors")
    train(model, dataset, recipes_for(dataset.name, epochs).train, seed=seed, checkpoint=checkpoint)
    midl.save(model, file)
    checkpoint.unlink(missing_ok=True)
    return model.eval()
