"""Accuracy against corrupted inputs, as curves and as the area below them."""

from __future__ import annotations

from typing import Any

import torch
from scipy.integrate import trapezoid
from torch import nn

from midl.lab.data import Dataset
from midl.lab.measures.corruptions import corruptions_for
from midl.lab.measures.watching import evaluating, sample_test_rows

__all__ = ["measure_robustness"]


def measure_robustness(model: nn.Module, dataset: Dataset, rows: int = 1000) -> dict[str, Any]:
    """Return, per corruption, the accuracy in percent at growing strengths and the normalised area under that curve.

    The area is the mean accuracy over the range of strengths (trapezoids), in percent. Rows and noise are the same for
    every model, so that models can be compared in pairs.
    """
    batches = sample_test_rows(dataset, rows)
    curves = {}
    with evaluating(model):
        for name, corruption in corruptions_for(dataset).items():
            accuracy = []
            for strength in corruption.strengths:
                generator = torch.Generator().manual_seed(0)
                correct = sum(
                    int((model(corruption.apply(x, strength, generator)).argmax(-1) == y).sum()) for x, y in batches
                )
                accuracy.append(round(100 * correct / sum(len(y) for _, y in batches), 3))
            span = corruption.strengths[-1] - corruption.strengths[0]
            curves[name] = {
                "unit": corruption.unit,
                "strengths": list(corruption.strengths),
                "accuracy": accuracy,
                "area": round(float(trapezoid(accuracy, corruption.strengths)) / span, 3),
            }
    return {"rows": sum(len(y) for _, y in batches), "curves": curves}
