"""Histograms of the gates: logits and gate values, of all groups and of the selected ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from midl.lab.data import Dataset
from midl.lab.measures.watching import evaluating, mid_layers, sample_test_rows, watch_layers
from midl.layers.logits import layer_logits
from midl.selection import selection_mask

__all__ = ["measure_gates"]


def measure_gates(model: nn.Module, dataset: Dataset, rows: int = 300, bins: int = 30) -> dict[str, Any]:
    """Return, per MID-L layer, histograms of the gate's logits s and of its values a = sigmoid(s).

    Each histogram: ``edges`` (bins + 1), ``all`` and ``selected`` (counts over rows, choices and groups). The logits'
    range leaves out half a per cent at either side, which is counted in the outer bins. Where the layers interpolate
    hard, a is not part of the output; ``"interpolation"`` tells.
    """
    layers = mid_layers(model)
    logits: dict[str, list[Tensor]] = {name: [] for name in layers}
    masks: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, inputs: Tensor, outputs: Tensor, selected: Tensor) -> None:
        logits[name].append(layer_logits(layers[name], inputs).flatten())
        masks[name].append(selection_mask(selected, layers[name].num_groups).flatten())

    with evaluating(model), watch_layers(layers, see):
        for x, _ in sample_test_rows(dataset, rows):
            model(x)
    out = {}
    for name, layer in layers.items():
        s, mask = torch.cat(logits[name]).double().numpy(), torch.cat(masks[name]).numpy()
        low, high = np.quantile(s, [0.005, 0.995])
        out[name] = {
            "interpolation": layer.config.interpolation,
            "logits": _histogram(s, mask, float(low), float(max(high, low + 1e-6)), bins),
            "values": _histogram(1 / (1 + np.exp(-s)), mask, 0.0, 1.0, bins),
        }
    return {"rows": min(rows, len(dataset.test)), "layers": out}


def _histogram(values: np.ndarray, mask: np.ndarray, low: float, high: float, bins: int) -> dict[str, Any]:
    clipped = np.clip(values, low, high)
    edges = np.linspace(low, high, bins + 1)
    return {
        "edges": [round(float(edge), 4) for edge in edges],
        "all": np.histogram(clipped, edges)[0].tolist(),
        "selected": np.histogram(clipped[mask], edges)[0].tolist(),
    }
