"""Activity maps: how often each group of neurons takes the full path, for the inputs of each class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from midl.lab.data import Dataset
from midl.lab.measures.watching import evaluating, mid_layers, sample_test_rows, watch_layers

__all__ = ["measure_activity"]


def measure_activity(model: nn.Module, dataset: Dataset, rows: int = 1000) -> dict[str, Any]:
    """Return, per MID-L layer, the fraction of the choices that selected each group, one list per class.

    The fractions of a class with no row among the ``rows`` test rows are ``None``. Empty for a model without MID-L
    layers. Every row of a map sums to k, the number of groups that each input selects.
    """
    layers = mid_layers(model)
    counts = {name: torch.zeros(dataset.num_classes, layer.num_groups) for name, layer in layers.items()}
    choices = {name: torch.zeros(dataset.num_classes) for name in layers}
    labels = torch.empty(0)

    def see(name: str, inputs: Tensor, outputs: Tensor, selected: Tensor) -> None:
        groups = counts[name].shape[1]
        per_row = torch.zeros(len(selected), groups)
        per_row.scatter_add_(1, selected.flatten(1).long(), torch.ones(len(selected), selected[0].numel()))
        counts[name].index_add_(0, labels, per_row)
        choices[name].index_add_(0, labels, torch.full((len(selected),), float(selected.shape[1])))

    with evaluating(model), watch_layers(layers, see):
        for x, labels in sample_test_rows(dataset, rows):  # noqa: B007 - read by see
            model(x)
    return {
        "rows": min(rows, len(dataset.test)),
        "layers": {
            name: [
                [round(float(count / total), 3) for count in counts[name][label]] if total else None
                for label, total in enumerate(choices[name])
            ]
            for name in layers
        },
    }
