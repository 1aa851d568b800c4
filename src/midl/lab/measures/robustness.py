"""Accuracy against corrupted inputs, as curves and as the area below them."""

from __future__ import annotations

from typing import Any

import torch
from scipy.integrate import trapezoid
from torch import nn

from midl.lab.data import Dataset
from midl.lab.measures.corruptions import corruptions_for
from midl.lab.measures.watching import Batch, evaluating, sample_test_rows

__all__ = ["measure_robustness"]


def measure_robustness(model: nn.Module, dataset: Dataset, rows: int | None = None) -> dict[str, Any]:
    """Return, per corruption, the accuracy in percent at growing strengths and the normalised area under that curve.

    The area is the mean accuracy over the range of strengths (trapezoids), in percent. Rows and noise are the same for
    every model, so that models can be compared in pairs.

    Args:
        model: takes the data set's inputs and returns logits.
        dataset: its test rows are used.
        rows: how many; ``None`` for 1000, or 400 where rows are texts or large images.
    """
    if rows is None:
        large = dataset.mean is None or torch.Size(dataset.input_shape).numel() > 1000
        rows = 400 if large else 1000
    batches = sample_test_rows(dataset, rows)
    total = sum(len(y) for _, y in batches)
    curves = {}
    with evaluating(model):
        clean = _accuracy(model, batches)
        for name, corruption in corruptions_for(dataset).items():
            accuracy = [clean]
            for strength in corruption.strengths[1:]:
                generator = torch.Generator().manual_seed(0)
                accuracy.append(_accuracy(model, [(corruption.apply(x, strength, generator), y) for x, y in batches]))
            curves[name] = {
                "unit": corruption.unit,
                "strengths": list(corruption.strengths),
                "accuracy": accuracy,
                "area": round(float(trapezoid(accuracy, corruption.strengths)) / corruption.strengths[-1], 3),
            }
    return {"rows": total, "curves": curves}


def _accuracy(model: nn.Module, batches: list[Batch]) -> float:
    correct = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches)
    return round(100 * correct / sum(len(y) for _, y in batches), 3)
