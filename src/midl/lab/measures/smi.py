"""Sliced mutual information: do the neurons that inputs select know more of the label than those they leave?

The paper's abstract (arXiv 2505.11416) says that it validates "the informativeness and selectivity of the learned
neurons via Sliced Mutual Information"; no code tells which neurons count as selected. This is what we chose.

The layer's outputs are what the next layer sees, y (rows, n) before the activation function; each neuron's mean over
the rows is subtracted, so that a neuron left out (zero) is one of which only the mean is known. With several positions
per row (images, sequences) the masked outputs are averaged over 64 of the positions. Two views, each with three sets of
the same number of groups (fewer in ``unselected`` where not enough are left):

- ``"neurons"``: fixed sets over all inputs. ``selected``: the k groups that the rows select most often, ``unselected``:
  the k they select least often, ``random``: k groups drawn anew for every slice.
- ``"inputs"``: each input its own. ``selected``: the k groups of its choice, ``unselected``: k of those it left, whose
  outputs are the light path's, ``random``: k of all; the others are zero. Here the choice itself can tell of the label,
  and a random choice loses information because any two inputs show different neurons.

A slice is a random direction of R^n, the same one for the three sets, restricted to the set. SMI of a set: the mean
over the slices of the mutual information between projection and label. Intervals: bootstrap over the slices, of the
paired differences too.

Source: Z. Goldfeld, K. Greenewald, "Sliced mutual information", NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from midl.lab.data import Dataset
from midl.lab.measures.mutual_information import estimate_mutual_information
from midl.lab.measures.watching import evaluating, mid_layers, sample_test_rows, watch_layers
from midl.lab.statistics import bootstrap_mean
from midl.layers import MIDConv2d, MIDLayer, MIDLinear
from midl.selection import selection_mask

__all__ = ["SETS", "measure_smi", "sliced_mutual_information"]

SETS = ("selected", "unselected", "random")

_POSITIONS = 64


def sliced_mutual_information(values: np.ndarray, labels: np.ndarray, slices: int = 64, seed: int = 0) -> np.ndarray:
    """Return the mutual information of ``slices`` random projections of the rows with the labels, in nats (slices,).

    Its mean is the sliced mutual information.

    >>> generator = np.random.default_rng(0)
    >>> labels = generator.integers(0, 2, 500)
    >>> values = labels[:, None] + 0.01 * generator.normal(size=(500, 8))
    >>> bool(sliced_mutual_information(values, labels).mean() > 0.6)  # at most log 2 = 0.69
    True

    Args:
        values: (rows, neurons).
        labels: (rows,).
    """
    return estimate_mutual_information(values @ _directions(values.shape[1], slices, seed), labels, seed=seed)


def measure_smi(model: nn.Module, dataset: Dataset, rows: int = 1000, slices: int = 64) -> dict[str, Any]:
    """Return the sliced mutual information of selected, unselected and random neurons, per MID-L layer; see the module.

    ``layers[name][view]`` holds, for every set and for the differences ``"selected-unselected"`` and
    ``"selected-random"``, ``mean``, ``low`` and ``high`` (95 % over slices), in nats; ``overall[view]`` the differences
    averaged over the layers. Empty for a model without MID-L layers.
    """
    # A MIDFFN's neurons are inside the block, where no next layer sees them.
    layers = {name: layer for name, layer in mid_layers(model).items() if isinstance(layer, (MIDLinear, MIDConv2d))}
    pools = {name: _Pool(layer) for name, layer in layers.items()}
    batches = sample_test_rows(dataset, rows)

    def see(name: str, inputs: Tensor, outputs: Tensor, selected: Tensor) -> None:
        pools[name].add(outputs, selected)

    with evaluating(model), watch_layers(layers, see):
        for x, _ in batches:
            model(x)
    labels = torch.cat([y for _, y in batches]).numpy()
    estimates = {name: _estimate(pool, labels, slices) for name, pool in pools.items()}
    views = ("neurons", "inputs")
    return {
        "unit": "nats",
        "rows": len(labels),
        "slices": slices,
        "layers": {name: {view: _summary(by_view[view]) for view in views} for name, by_view in estimates.items()},
        "overall": {
            view: {
                key: bootstrap_mean(np.mean([_differences(e[view])[key] for e in estimates.values()], axis=0))
                for key in ("selected-unselected", "selected-random")
            }
            for view in views
        }
        if layers
        else {},
    }


class _Pool:
    """The outputs of one layer, averaged over positions: of all neurons and, per input, of three choices of groups."""

    def __init__(self, layer: MIDLayer) -> None:
        self.layer = layer
        self.groups = layer.num_groups
        self.size = layer.config.group_size
        self.outputs: list[Tensor] = []
        self.masked: dict[str, list[Tensor]] = {name: [] for name in SETS}
        self.share: dict[str, list[Tensor]] = {name: [] for name in SETS}
        self.generator = torch.Generator().manual_seed(0)

    def add(self, outputs: Tensor, selected: Tensor) -> None:
        """Take in a batch: outputs as the layer gave them, selected (rows, choices, k)."""
        k = selected.shape[-1]
        y = outputs.movedim(1, -1) if isinstance(self.layer, MIDConv2d) else outputs
        line = 1 if y.dim() == 2 else y.shape[-2]
        y = y.reshape(len(y), -1, self.groups, self.size)
        positions = torch.randperm(y.shape[1], generator=torch.Generator().manual_seed(0))[:_POSITIONS]
        y = y[:, positions]
        chosen = selection_mask(selected[:, self._choices(positions, line)], self.groups)
        scores = torch.rand(chosen.shape, generator=self.generator)
        left = min(k, self.groups - k)
        masks = {
            "selected": chosen,
            "unselected": selection_mask(scores.masked_fill(chosen, -1.0).topk(left).indices, self.groups),
            "random": selection_mask(scores.topk(k).indices, self.groups),
        }
        self.outputs.append(y.mean(1).flatten(1))
        for name, mask in masks.items():
            self.masked[name].append((y * mask.unsqueeze(-1)).mean(1))
            self.share[name].append(mask.float().mean(1))

    def _choices(self, positions: Tensor, line: int) -> Tensor:
        """Return which of a row's choices each position follows; ``span`` neighbours on a line share one."""
        config = self.layer.config
        if config.select == "image":
            return torch.zeros_like(positions)
        return positions // line * -(-line // config.span) + positions % line // config.span

    def whole(self) -> np.ndarray:
        """Return all neurons' outputs, centred, float64 (rows, n)."""
        y = torch.cat(self.outputs).double()
        return (y - y.mean(0)).numpy()

    def chosen(self, name: str) -> np.ndarray:
        """Return each input's choice of neurons, centred, zero elsewhere, float64 (rows, n)."""
        mean = torch.cat(self.outputs).double().mean(0).view(self.groups, self.size)
        masked, share = torch.cat(self.masked[name]).double(), torch.cat(self.share[name]).double()
        return (masked - share.unsqueeze(-1) * mean).flatten(1).numpy()

    def usage(self) -> np.ndarray:
        """Return how often each group was selected, (groups,)."""
        return torch.cat(self.share["selected"]).double().mean(0).numpy()


def _estimate(pool: _Pool, labels: np.ndarray, slices: int) -> dict[str, dict[str, np.ndarray]]:
    """Return view to set to the mutual information of every slice."""
    usage = pool.usage()
    k = pool.layer.num_selected
    order = np.argsort(-usage, kind="stable")
    generator = np.random.default_rng(0)
    masks = {
        "selected": np.isin(np.arange(pool.groups), order[:k])[:, None],
        "unselected": np.isin(np.arange(pool.groups), order[k:][-k:])[:, None],
        "random": np.stack([generator.permutation(pool.groups) < k for _ in range(slices)], axis=1),
    }
    whole = pool.whole()
    directions = _directions(whole.shape[1], slices, seed=0)
    neurons = {
        name: estimate_mutual_information(whole @ (directions * mask.repeat(pool.size, axis=0)), labels)
        for name, mask in masks.items()
    }
    inputs = {name: estimate_mutual_information(pool.chosen(name) @ directions, labels) for name in SETS}
    return {"neurons": neurons, "inputs": inputs}


def _directions(neurons: int, slices: int, seed: int) -> np.ndarray:
    """Return random unit vectors, (neurons, slices)."""
    directions = np.random.default_rng(seed).standard_normal((neurons, slices))
    return directions / np.linalg.norm(directions, axis=0)


def _differences(sets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"selected-{other}": sets["selected"] - sets[other] for other in ("unselected", "random")}


def _summary(sets: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: bootstrap_mean(values) for name, values in {**sets, **_differences(sets)}.items()}
