"""Which dense layers have a MID-L counterpart, and how each is turned into the other."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from midl.config import MIDConfig
from midl.layers import MIDFFN, Factors, MIDConv2d, MIDLayer, MIDLinear
from midl.layers.ffn import DenseFFN

__all__ = ["Family", "family_by_name", "family_of", "family_of_layer", "has_hooks", "why_not"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A dense layer type and its MID-L counterpart.

    Attributes:
        name: stable name, written into checkpoints.
        like: dense layer and configuration to a MID-L layer with the dense layer's own weight and bias, its light
            path and gate uninitialised.
        to_dense: MID-L layer to dense layer, with the very same weights.
        to_linear: dense layer to the nn.Linear that computes the same, with the same parameters where they have the
            same layout; None where there is none.
        from_linear: the way back.
    """

    name: str
    like: Callable[[Any, MIDConfig], MIDLayer]
    to_dense: Callable[[Any], nn.Module]
    to_linear: Callable[[Any], nn.Linear] | None = None
    from_linear: Callable[[nn.Linear], nn.Module] | None = None


def _conv1d_class() -> type[nn.Module] | None:
    """Return transformers' Conv1D (a linear layer with a transposed weight) if transformers has been imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _like_conv1d(dense: Any, config: MIDConfig) -> MIDLayer:
    return MIDLinear._like(_linear_of(dense), config)


def _linear_of(conv1d: Any) -> nn.Linear:
    """Return the nn.Linear that computes what a Conv1D does; the transposed weight is a copy."""
    linear = nn.Linear(conv1d.weight.shape[0], conv1d.weight.shape[1], device="meta")
    linear.weight = _transposed(conv1d.weight)
    linear.bias = conv1d.bias
    return linear.train(conv1d.training)


def _transposed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)


def _to_conv1d(layer: MIDLinear) -> nn.Module:
    layer._check_plain("MIDLinear.to_conv1d")
    return _conv1d_of(layer.to_linear())


def _conv1d_of(linear: nn.Linear) -> nn.Module:
    conv1d = _conv1d_class()
    if conv1d is None:  # Converted in another process and loaded here: its twin without transformers is nn.Linear.
        return linear
    with torch.device("meta"):
        dense: Any = conv1d(linear.out_features, linear.in_features)
    dense.weight, dense.bias = _transposed(linear.weight), linear.bias
    return dense


def _itself(linear: nn.Linear) -> nn.Linear:
    return linear


def _like_ffn(dense: DenseFFN, config: MIDConfig) -> MIDFFN:
    # One configuration serves a whole model: what only other layers have choices for does not matter here.
    return MIDFFN._like(dense, config.replace(gate="projection", span=1, select="position"))


LINEAR = Family("linear", MIDLinear._like, MIDLinear.to_linear, _itself, _itself)
CONV2D = Family("conv2d", MIDConv2d._like, MIDConv2d.to_conv2d)
CONV1D = Family("conv1d", _like_conv1d, _to_conv1d, _linear_of, _conv1d_of)
FFN = Family("ffn", _like_ffn, MIDFFN.to_dense)
_BY_NAME = {family.name: family for family in (LINEAR, CONV2D, CONV1D, FFN)}


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a dense layer by its exact type, or None."""
    if type(module) is nn.Linear:
        return LINEAR
    if type(module) is nn.Conv2d:
        return CONV2D
    if type(module) is DenseFFN:
        return FFN
    return CONV1D if _conv1d_class() is not None and type(module) is _conv1d_class() else None


def family_by_name(name: str) -> Family:
    """Return the family of a stable name."""
    return _BY_NAME[name]


def family_of_layer(layer: MIDLayer | Factors) -> Family:
    """Return the family that a MID-L layer goes back to, or came from."""
    return _BY_NAME[layer.dense_family]


def why_not(module: nn.Module, shared_parameters: set[int]) -> str | None:
    """Return why ``module`` cannot be converted, whatever the configuration, or None.

    Args:
        module: a module with parameters of its own.
        shared_parameters: ids of the parameters that more than one module holds.
    """
    family = family_of(module)
    kind = type(module).__name__
    if isinstance(module, MIDLayer):
        return f"is a {kind} already"
    if isinstance(module, Factors):
        return "is what is left of a layer that is its light path alone"
    if nn.utils.parametrize.is_parametrized(module):
        return f"is parametrized ({', '.join(module.parametrizations)}); the parametrization would be lost"  # type: ignore[arg-type]
    if family is None:
        base = next((b.__name__ for b in (nn.Linear, nn.Conv2d) if isinstance(module, b)), None)
        if base is None:
            return f"no MID-L counterpart of {kind}"
        return f"{kind} is a subclass of nn.{base}: its forward may differ, or its weight be read without calling it"
    if any(getattr(module, name) for name in _HOOKS):
        return "has hooks, which the conversion would lose"
    weight: Any = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, expected a floating-point parameter"
    if weight.is_meta:
        return "its weight has no data (meta device)"
    if family is CONV1D and id(weight) in shared_parameters:
        return "its weight is tied to another module's, and Conv1D stores it transposed"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"grouped convolution (groups={module.groups})"
    return None


_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS = (*_CALL_HOOKS, "_state_dict_hooks", "_load_state_dict_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return whether calls of ``module`` run hooks, which a replacement would lose."""
    return any(getattr(module, name) for name in _CALL_HOOKS)
