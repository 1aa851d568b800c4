"""Fold batch normalisation into the layer in front of it, as torch.nn.utils.fusion does for dense layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midl.checks import check_module
from midl.conversion.convert import replace_modules
from midl.errors import MIDLError
from midl.layers import MIDConv2d, MIDLayer, MIDLinear
from midl.serving.pairs import find_pairs, named_pairs

__all__ = ["fuse_batch_norm_"]

# Exact types: a parametrized layer is of another.
_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d,
    MIDLinear: nn.BatchNorm1d, MIDConv2d: nn.BatchNorm2d,
}  # fmt: skip

_NORMS = tuple(set(_NORM_OF.values()))


def fuse_batch_norm_(model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """Fold batch normalisation into the layers whose output it takes, in place; return (layer, norm) by name.

    >>> model = nn.Sequential(MIDConv2d(3, 32, 3, rank=4, group_size=16), nn.BatchNorm2d(32), nn.ReLU()).eval()
    >>> fuse_batch_norm_(model)
    [('0', '1')]
    >>> model[1]
    Identity()

    The model computes the same up to rounding, selects the same groups, and is for inference: of each pair the layer
    has new parameters, a bias among them, and the norm is an nn.Identity. A layer with the light gate gets a
    projection that ranks its groups as before. Linear layers are taken to have outputs (rows, features).

    Found are pairs of an nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, MIDLinear or MIDConv2d and its nn.BatchNorm, each
    called once, without hooks or parametrizations, where nothing else takes the layer's output or parameters.

    Args:
        model: in ``eval()`` mode, on any device.
        pairs: names of layer and norm, where torch.fx cannot follow the model's forward; None: found by torch.fx.

    Raises:
        MIDLError: torch.fx cannot follow the model, a norm is in training mode or has no running statistics, or a pair
            is none of those above.
    """
    check_module("fuse_batch_norm_", model)
    modules = dict(model.named_modules())
    if pairs is None:
        has_norms = any(isinstance(module, _NORMS) for module in modules.values())
        found = find_pairs("fuse_batch_norm_", model, modules, _is_normed) if has_norms else []
    else:
        found = named_pairs("fuse_batch_norm_", modules, pairs)
    folded = [_folded(modules, *pair) for pair in found]
    for (layer_name, _), parameters in zip(found, folded, strict=True):
        layer = modules[layer_name]
        if isinstance(layer, MIDLayer):
            layer.config = layer.config.replace(gate="projection")
        for key, values in parameters.items():
            trained = layer._parameters.get(key) if layer._parameters.get(key) is not None else layer.weight
            layer.register_parameter(key, nn.Parameter(values, requires_grad=trained.requires_grad))
    replace_modules(model, {id(modules[norm]): nn.Identity() for _, norm in found})
    return found


def _is_normed(layer: nn.Module, norm: nn.Module) -> bool:
    return _NORM_OF.get(type(layer)) is type(norm)


@torch.no_grad()
def _folded(modules: Mapping[str, nn.Module], layer_name: str, norm_name: str) -> dict[str, Tensor]:
    """Return the layer's new parameters."""
    layer: Any = modules[layer_name]
    norm: Any = modules[norm_name]
    if not _is_normed(layer, norm):
        raise MIDLError(
            f"fuse_batch_norm_: pair ({layer_name!r}, {norm_name!r}) is a {type(layer).__name__} and a "
            f"{type(norm).__name__}, expected one of {[(a.__name__, b.__name__) for a, b in _NORM_OF.items()]}, "
            "not parametrized"
        )
    if norm.training or norm.running_mean is None or norm.running_var is None:
        what = "in training mode" if norm.training else "without running statistics"
        raise MIDLError(f"fuse_batch_norm_: {norm_name} is {what}, expected model.eval() and track_running_stats=True")
    if len(layer.weight) != norm.num_features:
        raise MIDLError(
            f"fuse_batch_norm_: {norm_name} has num_features={norm.num_features}, expected {len(layer.weight)} as "
            f"{layer_name} has outputs"
        )
    exact = torch.float64
    scale = (norm.running_var.to(exact) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(exact)
    shift = -norm.running_mean.to(exact) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(exact)
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.to(exact)
    new = {"weight": _scaled(layer.weight, scale), "bias": (bias * scale + shift).to(layer.weight.dtype)}
    if isinstance(layer, MIDLayer):
        new["light_up"] = _scaled(layer.light_up, scale)
        if layer.config.gate == "light":  # it is the mean of what is scaled now
            rows, size = layer.light_up.to(exact), layer.config.group_size
            new["gate_weight"] = rows.unflatten(0, (-1, size)).mean(1).to(layer.weight.dtype)
            new["gate_bias"] = bias.unflatten(0, (-1, size)).mean(1).to(layer.weight.dtype)
    return new


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.to(scale.dtype) * scale.view(-1, *[1] * (rows.dim() - 1))).to(rows.dtype)
