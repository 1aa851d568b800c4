"""What the measures share: which test rows they look at, and what the MID-L layers do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from midl.lab.data import Dataset
from midl.layers import MIDLayer
from midl.layers.base import observers

__all__ = ["Batch", "evaluating", "mid_layers", "sample_test_rows", "watch_layers"]

Batch = tuple[Tensor, Tensor]
"""Inputs (rows, ...) as the model takes them, and labels (rows,)."""

_BATCH = 100


def sample_test_rows(dataset: Dataset, rows: int) -> list[Batch]:
    """Return ``rows`` random test rows in batches, all where there are fewer; the same rows on every call.

    Random and not the first: some data sets are sorted by class.
    """
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[:rows]
    return [dataset.batch(dataset.test, part) for part in order.sort().values.split(_BATCH)]


def mid_layers(model: nn.Module) -> dict[str, MIDLayer]:
    """Return the MID-L layers of a model that select, by qualified name; those with ``active=0`` do not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MIDLayer) and module.active}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, and back into its own mode after the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def watch_layers(layers: Mapping[str, MIDLayer], see: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the block, call ``see(name, inputs, outputs, selected)`` after each forward pass of every layer.

    ``selected`` is (rows, choices, k): each input row makes one choice, or one for every block of positions.
    """
    last: dict[MIDLayer, Tensor] = {}

    def observe(layer: MIDLayer, selected: Tensor) -> None:
        last[layer] = selected

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def call(layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            selected = last.pop(layer)  # type: ignore[call-overload]
            see(name, inputs[0], outputs, selected.reshape(len(outputs), -1, selected.shape[-1]))

        return call

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    observers.append(observe)
    try:
        yield
    finally:
        observers.remove(observe)
        for handle in handles:
            handle.remove()
