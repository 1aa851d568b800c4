"""What follows a layer, in numbers: how much the model's output moves when one of its neurons does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from midl.adaptation.batches import run
from midl.adaptation.calibrate import Moments, without_bias
from midl.adaptation.light_path import LightPath
from midl.adaptation.outputs import from_rows, hooked, to_rows
from midl.analysis.flops import evaluation_mode
from midl.errors import MIDLError

__all__ = ["OutputRows", "sample_outputs", "weigh_outputs"]

_PER_BATCH = 1024
# How much of a metric is left to plain squares: it was measured on some rows and with the other layers dense.
_SHRINKAGE = 0.05


class OutputRows(NamedTuple):
    """Rows of a layer's output without bias, ``full`` (rows, n), and the ``weight`` (rows, n) of an error in each."""

    full: Tensor
    weight: Tensor

    def energy(self, light: Tensor, group_size: int) -> Tensor:
        """Return what each group loses on the light path: weighted squares of full - light, (rows, groups)."""
        return (self.weight * (self.full - light).square()).unflatten(-1, (-1, group_size)).sum(-1)


def sample_outputs(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    light_path: LightPath,
    batches: Sequence[Any],
    *,
    rows: int = 4096,
    draws: int = 4,
    seed: int = 0,
) -> OutputRows:
    """Return output rows of one layer, each neuron with the sensitivity of the model's output to it.

    The weight of neuron j in a row is an estimate of ||dY / dy_j||^2, Y the whole output of the model: the mean over
    ``draws`` random vectors v of (d(v . Y) / dy_j)^2. So it holds for whatever follows the layer, an activation, a
    normalisation, a residual sum, and needs no labels. A random half of the neurons is on the light path meanwhile:
    an activation's slope counts at both ends of the step from light to full, not only where the dense model is.

    A layer that the output does not depend on gets weights of zero.

    Args:
        model: left as it was.
        name: of the layer, for messages.
        layer: a dense layer of ``model``.
        light_path: the layer's.
        batches: inputs of the model.
        rows: rows to return, at most.
        draws: random vectors per batch; more draws, less noise.
        seed: of the random choices.

    Raises:
        MIDLError: gradients cannot be had.
    """
    device = next(layer.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    found: list[tuple[Tensor, Tensor]] = []
    calls: list[tuple[Tensor, Tensor]] = []

    def put_half_on_light(name: str, output: Tensor) -> Tensor:
        full = without_bias(layer, to_rows(layer, output)).detach()
        light = full @ (light_path.up @ light_path.reader).T.to(full.dtype)
        kept = torch.rand(full.shape, generator=random, device=device) < 0.5
        mixed = torch.where(kept, 0, light - full)
        leaf = (output.detach() + from_rows(layer, mixed, output)).requires_grad_()
        calls.append((full, leaf))
        return leaf.clone()  # what follows may work in place

    with evaluation_mode(model), hooked({name: layer}, put_half_on_light), torch.enable_grad():
        for batch in batches:
            calls.clear()
            output = run(model, batch)
            leaves = [leaf for _, leaf in calls]
            squares = [torch.zeros_like(leaf) for leaf in leaves]
            for _ in range(draws):
                v = torch.randn(output.shape, generator=random, device=device).to(output.dtype)
                grads = _gradients(output, v, leaves, name)
                squares = [total + grad.square() / draws for total, grad in zip(squares, grads, strict=True)]
            found += [
                _some(full, to_rows(layer, square), random)
                for (full, _), square in zip(calls, squares, strict=True)
            ]  # fmt: skip
            if sum(len(full) for full, _ in found) >= rows:
                break
    full, weight = (torch.cat(parts)[:rows] for parts in zip(*found, strict=True))
    finite = full.isfinite().all(-1) & weight.isfinite().all(-1)
    return OutputRows(full[finite].float(), weight[finite].float())


def weigh_outputs(
    model: nn.Module, batches: Sequence[Any], layers: Mapping[str, nn.Module], moments: Mapping[str, Moments], *,
    draws: int = 2, seed: int = 0,
) -> None:  # fmt: skip
    """Set the ``metric`` of every layer's moments: what an error in its output costs the model's output.

    To first order an error e at one row costs ||J e||^2, J = dY / dy; the metric is the mean of J^T J over rows, from
    random projections v . Y as in :func:`sample_outputs`, shrunk a little towards plain squares. A layer that the
    output does not depend on keeps plain squares.

    >>> from midl.adaptation import calibrate
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> model[1].weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    tensor([[1., 0., 0.],
            [0., 2., 0.]])
    >>> layers, x = {"0": model[0]}, [torch.randn(500, 4)]
    >>> moments = calibrate(model, x, layers)
    >>> weigh_outputs(model, x, layers, moments)
    >>> moments["0"].metric.diagonal().argsort().tolist()
    [2, 0, 1]

    Args:
        model: left as it was.
        batches: inputs of the model.
        layers: name to dense layer of ``model``.
        moments: of these layers.
        draws: random vectors per batch.
        seed: of the random vectors.

    Raises:
        MIDLError: gradients cannot be had.
    """
    sums = {name: torch.zeros_like(found.second_moment) for name, found in moments.items()}
    called: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        called.append((name, output))
        return output.clone()  # what follows may work in place

    with evaluation_mode(model), hooked(layers, keep), torch.enable_grad():
        for i, batch in enumerate(batches):
            called.clear()
            output = run(model, batch)
            random = torch.Generator(output.device).manual_seed(seed * 1_000_003 + i)
            for _ in range(draws):
                v = torch.randn(output.shape, generator=random, device=output.device).to(output.dtype)
                grads = _gradients(output, v, [tensor for _, tensor in called], "the layers")
                for (name, _), grad in zip(called, grads, strict=True):
                    rows = to_rows(layers[name], grad)
                    rows = rows[rows.isfinite().all(-1)].double()
                    basis = moments[name].basis
                    rows = rows if basis is None else rows @ basis
                    sums[name] += rows.T @ rows
    for name, total in sums.items():
        size = float(total.trace()) / len(total)
        if math.isfinite(size) and size > 0:
            plain = torch.eye(len(total), dtype=total.dtype, device=total.device)
            moments[name].metric = (1 - _SHRINKAGE) * total / size + _SHRINKAGE * plain


def _some(full: Tensor, weight: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a random part of the rows: the positions of an image are many and alike."""
    if len(full) <= _PER_BATCH:
        return full, weight
    rows = torch.randperm(len(full), generator=random, device=full.device)[:_PER_BATCH]
    return full[rows], weight[rows]


def _gradients(output: Tensor, v: Tensor, leaves: list[Tensor], name: str) -> list[Tensor]:
    """Return the gradients of v . output, zero where the output does not depend on a leaf."""
    if not leaves or not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    try:
        grads = torch.autograd.grad((output * v).sum(), leaves, retain_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise MIDLError(f"adapt: no gradients can be had of what follows {name}: {error}") from error
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]
