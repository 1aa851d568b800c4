"""Mixed precision end to end: ``python -m midl.lab.gpu.mixed_precision`` trains on MNIST with and without autocast.

The same code path as on a GPU: parameters and optimiser in float32, products in the autocast dtype, and the gate's
logits accumulated in float32 so that the choice of groups is stable.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys

import torch
from torch import Tensor, nn

import midl
from midl.lab.data import Dataset, load
from midl.lab.models import MLP
from midl.lab.training import Recipe, train

__all__ = ["Autocast", "accuracy", "compare_precisions"]


class Autocast(nn.Module):
    """Runs a model under autocast and returns float32, for the loss.

    >>> model = Autocast(midl.MIDLinear(8, 16, rank=2), torch.bfloat16)
    >>> model(torch.randn(3, 8)).dtype, model.model.weight.dtype
    (torch.float32, torch.float32)
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output."""
        with torch.autocast(x.device.type, self.dtype):
            return self.model(x).float()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Return the percentage of test rows that ``model`` classifies rightly."""
    right = 0
    for rows in torch.arange(len(dataset.test)).split(1000):
        inputs, labels = dataset.batch(dataset.test, rows)
        right += int((model(inputs).argmax(1) == labels).sum())
    return 100 * right / len(dataset.test)


def compare_precisions(
    dataset: Dataset, *, hidden: tuple[int, ...], epochs: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Train one network in float32 and one under autocast from the same start; return both test accuracies.

    The second is trained and scored under autocast.
    """
    scores = []
    for autocast in (False, True):
        torch.manual_seed(seed)
        architecture = MLP(math.prod(dataset.input_shape), hidden, dataset.num_classes)
        model: nn.Module = architecture.build()
        midl.convert_(model, midl.MIDConfig(active=0.45, group_size=16), overrides={"head": None})
        if autocast:
            model = Autocast(model, dtype)
        train(model, dataset, Recipe(epochs=epochs), seed=seed)
        scores.append(accuracy(model, dataset))
    return scores[0], scores[1]


def main() -> None:
    """Print accuracies and their difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    dataset = load(options.dataset)
    differences = []
    for seed in range(options.seeds):
        full, half = compare_precisions(dataset, hidden=(256, 256), epochs=options.epochs, seed=seed)
        differences.append(half - full)
        print(f"seed {seed}: float32 {full:.2f} %, bfloat16 autocast {half:.2f} %", flush=True)
    mean = statistics.fmean(differences)
    print(f"bfloat16 minus float32: {mean:+.2f} points on average over {options.seeds} seeds")
    sys.exit(mean < -0.2)


if __name__ == "__main__":
    main()
