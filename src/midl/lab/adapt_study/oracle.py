"""The best selection that a converted network could make, to see what the gate leaves on the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.layers import MIDConv2d, MIDLayer, MIDLinear
from midl.selection import selection_mask, topk_groups

__all__ = ["select_by_oracle"]

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.BatchNorm1d, nn.BatchNorm2d)
_TRANSPARENT = (nn.Flatten, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d)
# Far above any logit: added to those of the chosen groups it decides the selection, which is all that noise enters.
_DECISIVE = 1e6


@contextmanager
def select_by_oracle(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Inside the block, the MID-L layers of ``model`` select the groups whose full path changes most what follows.

    The score of a group is the sum over its neurons of the squared change that the selection can prevent, behind the
    normalisation and activation modules that read the layer's output, times the squared norm of the weights with which
    the next layer reads the neuron (1 where no such layer follows, as before a residual sum). It cannot be computed
    without the full path; the number of groups, the light path and the weights are those of the model. Greedy, layer by
    layer: a bound for gates in practice, not in theory.

    Args:
        model: with MID-L layers that select per position and without ``span``; evaluated.
        example: a batch of inputs, run once to see which module reads which output.
    """
    readers = _find_readers(model, example)
    handles = []
    for layer in model.modules():
        if isinstance(layer, (MIDLinear, MIDConv2d)) and layer.active:
            chain, outgoing = _what_follows(layer, readers)
            handles.append(layer.register_forward_hook(_choose(chain, outgoing)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _find_readers(model: nn.Module, example: Tensor) -> dict[nn.Module, list[nn.Module]]:
    """Return which modules take each module's very output tensor as an input."""
    produced: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept: a freed one's id could come back
    readers: dict[nn.Module, list[nn.Module]] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        for argument in args:
            if id(argument) in produced:
                readers.setdefault(produced[id(argument)][0], []).append(module)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            produced.setdefault(id(output), (module, output))

    leaves = [m for m in model.modules() if not list(m.children())]
    handles = [m.register_forward_pre_hook(before) for m in leaves]
    handles += [m.register_forward_hook(after) for m in leaves]
    was_training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return readers


def _what_follows(layer: MIDLayer, readers: dict[nn.Module, list[nn.Module]]) -> tuple[list[nn.Module], Tensor | None]:
    """Return the elementwise modules behind a layer, and the squared norm of the weights that then read each neuron."""
    chain: list[nn.Module] = []
    module: nn.Module = layer
    while len(readers.get(module, ())) == 1:
        module = readers[module][0]
        if isinstance(module, _ELEMENTWISE):
            chain.append(module)
        elif not isinstance(module, _TRANSPARENT):
            break
    weight = getattr(module, "weight", None)
    if isinstance(module, (nn.Linear, nn.Conv2d, MIDLayer)) and module is not layer and weight.dim() >= 2:  # type: ignore[union-attr]
        norms = weight.detach().square().transpose(0, 1).flatten(1).sum(1)  # type: ignore[union-attr]
        n = layer.weight.shape[0]
        return chain, norms.unflatten(0, (n, -1)).sum(1) if len(norms) % n == 0 else None
    return chain, None


def _choose(chain: list[nn.Module], outgoing: Tensor | None) -> Any:
    @torch.no_grad()
    def hook(layer: MIDLinear | MIDConv2d, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        full, light = _paths(layer, x)
        for module in chain:
            full, light = module(full), module(light)
        axis = -3 if isinstance(layer, MIDConv2d) else -1
        change = (full - light).square().movedim(axis, -1)
        if outgoing is not None:
            change = change * outgoing
        scores = change.unflatten(-1, (-1, layer.config.group_size)).sum(-1)
        chosen = selection_mask(topk_groups(scores, layer.num_selected), layer.num_groups)
        return _run(layer, x, chosen * _DECISIVE)

    return hook


def _paths(layer: MIDLinear | MIDConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return full and light path, with bias."""
    if isinstance(layer, MIDLinear):
        light = F.linear(F.linear(x, layer.light_down), layer.light_up, layer.bias)
        return F.linear(x, layer.weight, layer.bias), light
    dense = layer.to_conv2d()
    full = dense(x)
    dense.weight = layer.light_down
    dense.register_parameter("bias", None)
    code = dense(x)
    return full, F.conv2d(code, layer.light_up[:, :, None, None], layer.bias)


def _run(layer: MIDLinear | MIDConv2d, x: Tensor, noise: Tensor) -> Tensor:
    """Return the layer's output with noise of the caller's, (..., positions, groups)."""
    config, training = layer.config, layer.training
    try:
        layer.config, layer.training = config.replace(noise=1.0), True
        layer.__dict__["_draw_noise"] = lambda x, shape: noise.reshape(*shape, -1)
        return layer.forward(x)
    finally:
        layer.config, layer.training = config, training
        del layer.__dict__["_draw_noise"]
