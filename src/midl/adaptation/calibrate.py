"""calibrate: what the layers of a model put out on real inputs, in second moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from midl.adaptation.batches import run
from midl.adaptation.outputs import hooked, to_rows
from midl.analysis.flops import evaluation_mode

__all__ = ["Moments", "Principal", "calibrate"]


class Principal(NamedTuple):
    """Directions of a layer's output in descending order of what the model loses without them, float64.

    Attributes:
        directions: (n, m); f is the sum of its components times these.
        readers: (m, n); the components of f are ``readers @ f``.
        energies: (m,), at least 0: the mean weighted squares of the components. Those beyond the first r add up to the
            least error of any rank-r map.
    """

    directions: Tensor
    readers: Tensor
    energies: Tensor


@dataclasses.dataclass
class Moments:
    """Second moments of one layer's output without bias, f = W x, over the rows of the calibration data.

    They are kept in an orthonormal basis of the layer's outputs, which is the smaller of neurons and inputs wide, so
    that nothing has to be unfolded for a convolution: the moments of f are those of x seen through W.

    Attributes:
        basis: (n, m) orthonormal columns that span every output, m = min(n, fan-in); None for the identity (m = n).
        second_moment: (m, m) float64, the sum of t t^T over the rows, t = basis^T f.
        rows: rows that were counted.
        dropped: rows with NaN or infinite values, which were not.
        metric: (m, m) float64, what an error e in t costs the model's output, e^T metric e (positive definite);
            None: every error costs its square. From :func:`midl.adaptation.weigh_outputs`.
    """

    basis: Tensor | None
    second_moment: Tensor
    rows: int = 0
    dropped: int = 0
    metric: Tensor | None = None

    @classmethod
    def empty(cls, weight: Tensor) -> Moments:
        """Return the moments before the first row, for a layer of ``weight`` (n, fan-in)."""
        n, fan_in = weight.shape
        basis = None if n <= fan_in else torch.linalg.qr(weight.detach().double()).Q
        return cls(basis, torch.zeros(min(n, fan_in), min(n, fan_in), dtype=torch.float64, device=weight.device))

    def add(self, rows: Tensor) -> None:
        """Count rows of f, (rows, n)."""
        finite = rows.isfinite().all(-1)
        t = rows[finite].double()
        if self.basis is not None:
            t = t @ self.basis
        self.second_moment += t.T @ t
        self.rows += len(t)
        self.dropped += len(rows) - len(t)

    def permuted(self, order: Tensor) -> Moments:
        """Return the moments of the same layer with its neurons in ``order``."""
        if self.basis is not None:
            return dataclasses.replace(self, basis=self.basis[order])
        metric = None if self.metric is None else self.metric[order][:, order]
        return dataclasses.replace(self, second_moment=self.second_moment[order][:, order], metric=metric)

    def principal_outputs(self) -> Principal:
        """Return the principal components of the output: orthonormal without a metric, else in that metric."""
        second = self.second_moment / max(1, self.rows)
        if self.metric is None:
            energies, directions = torch.linalg.eigh(second)
            readers = directions.T
        else:
            root = torch.linalg.cholesky(self.metric)  # an error e costs the square of root^T e
            energies, rotation = torch.linalg.eigh(root.T @ second @ root)
            directions = torch.linalg.solve_triangular(root.T, rotation, upper=True)
            readers = rotation.T @ root.T
        if self.basis is not None:
            directions, readers = self.basis @ directions, readers @ self.basis.T
        return Principal(directions.flip(-1), readers.flip(0), energies.flip(-1).clamp(min=0))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Any], layers: Mapping[str, nn.Module]) -> dict[str, Moments]:
    """Return the second moments of the outputs of ``layers`` while ``model`` evaluates ``batches``.

    Memory does not grow with the data. A layer that the data never reaches has ``rows == 0``. The model is left as it
    was, its training flags included, and the hooks are removed whatever happens.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    >>> calibrate(model, [torch.randn(32, 8)], {"0": model[0]})["0"].rows
    32

    Args:
        model: contains the layers.
        batches: inputs, as :func:`midl.adapt` takes them.
        layers: name to nn.Linear, nn.Conv2d or transformers' Conv1D.

    Raises:
        MIDLError: the model does not take the data.
    """
    moments = {name: Moments.empty(weight_of(layer)) for name, layer in layers.items()}

    def count(name: str, output: Tensor) -> None:
        moments[name].add(without_bias(layers[name], to_rows(layers[name], output)))

    with evaluation_mode(model), hooked(layers, count):
        for batch in batches:
            run(model, batch)
    return moments


def weight_of(layer: Any) -> Tensor:
    """Return a dense layer's weight as (neurons, fan-in), without gradient."""
    weight: Tensor = layer.weight.detach()
    return weight.flatten(1) if isinstance(layer, (nn.Linear, nn.Conv2d)) else weight.T


def without_bias(layer: Any, rows: Tensor) -> Tensor:
    """Return f = W x of the output rows W x + bias."""
    return rows if layer.bias is None else rows - layer.bias.detach()
