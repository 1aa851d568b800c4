"""Serve with less memory: the packed weights alone, or the light path alone.

A layer on the CPU keeps its parameters and, from the second call on, panels made of them for the kernels: as much
again, and every call looks whether the parameters have changed. :func:`pack_` makes the panels and frees what they
copy. Such a layer computes the same bits, sooner where it is small; what would need the plain weights is an error that
names the way back, :func:`unpack_`. :func:`factor_` frees, for good, the full weights of layers that never use them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from midl.checks import check_module
from midl.conversion.convert import replace_modules
from midl.conversion.families import has_hooks
from midl.errors import KernelError, MIDLError
from midl.layers import MIDFFN, Factors, MIDConv2d, MIDLayer, MIDLinear
from midl.layers.base import observers
from midl.ops.dispatch import is_plain_inference, unavailable_reason
from midl.ops.native import infers_plainly
from midl.ops.native_panels import FFNPanels, Panels, ffn_runs_on_panels, runs_on_panels
from midl.serving.pairs import find_pairs, named_pairs

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PackedMIDConv2d",
    "PackedMIDFFN",
    "PackedMIDLinear",
    "PackedReLU",
    "PackedSequential",
    "factor_",
    "fuse_relu_",
    "pack_",
    "unpack_",
]


class _Direct(nn.Module):
    """A module whose calls go straight to ``forward`` where there are no hooks; torch's way takes a microsecond."""

    def __call__(self, input: Tensor) -> Tensor:
        """Return :meth:`forward`; tracers, whose inputs are no tensors, see the module as any other."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if hooks or _has_any_global_hook() or type(input) is not Tensor:
            return super().__call__(input)
        return self.forward(input)


class _Packed(_Direct, MIDLayer):
    """A layer whose large parameters exist as panels alone."""

    may_be_light_alone = False
    _plain_class: type[MIDLayer]
    _panels: Panels | FFNPanels
    _plain: dict[str, nn.Parameter]
    """The parameters, without values, for :func:`unpack_` to fill again."""

    _relu: tuple[nn.Module, ...] = ()  # the nn.ReLU that is part of the layer, in a tuple so that it is no child

    def _check_watched(self, x: Any) -> None:
        """Raise where autograd or another observer of operations would have to be shown the op."""
        if isinstance(x, Tensor) and not is_plain_inference(x, self._parameters["weight"]):
            raise self._refuse("forward outside of torch.no_grad() or under compilation, tracing or a profiler")

    def _check_replaced(self) -> None:
        """Raise where a parameter that still has values is no longer what the kernels would read."""
        tensors = tuple(self._parameters[name] for name in self._tensor_names)
        self._check_shapes(tensors)
        dtype = self._parameters["weight"].dtype  # type: ignore[union-attr]
        for name, t in zip(self._tensor_names, tensors, strict=True):
            if t is not None and not t.is_meta and (t.dtype != dtype or t.device.type != "cpu"):
                raise MIDLError(
                    f"{self._plain_class.__name__}: {name} has dtype {t.dtype} on {t.device}, expected {dtype} on the "
                    "CPU (the layer is packed)"
                )

    def train(self, mode: bool = True) -> Self:
        """Refuse to train."""
        if mode:
            raise self._refuse("train()")
        return super().train(mode)

    def _check_input(self, x: Tensor, axis: int, expected: int, name: str) -> None:
        owner = self._plain_class.__name__
        if not isinstance(x, Tensor) or x.dim() < -axis or x.shape[axis] != expected:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MIDLError(f"{owner}: input of shape {shape}, expected {expected} {name} at axis {axis}")
        if x.dtype != self.weight.dtype or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            raise MIDLError(
                f"{owner}: input has dtype {x.dtype} on {x.device}, expected {self.weight.dtype} on the CPU without "
                "autocast (the layer is packed)"
            )

    def _check_plain(self, method: str) -> None:
        raise self._refuse(method)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise self._refuse("to(), half() and the like")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise self._refuse("state_dict()")

    def _load_from_state_dict(self, *args: Any) -> None:
        raise self._refuse("load_state_dict()")

    def _refuse(self, what: str) -> MIDLError:
        return MIDLError(
            f"{self._plain_class.__name__}: {what}: the layer is packed for serving and has no plain weights, expected "
            "midl.serving.unpack_(model) first"
        )


class PackedMIDLinear(_Packed, MIDLinear):
    """A :class:`midl.MIDLinear` whose large parameters exist as panels alone; made by :func:`pack_`.

    The budget can change, the selection can be watched. ``weight``, ``light_down``, ``light_up`` and ``gate_weight``
    are meta tensors: shapes without values.
    """

    _plain_class = MIDLinear
    _panels: Panels

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (..., out_features)."""
        x = input  # the name that nn.Linear has
        if not (observers or torch.compiler.is_compiling()):
            prepared = self._panels.call_linear(x, self._parameters, self.config, bool(self._relu))
            if prepared is not None:
                return prepared
        self._check_watched(x)
        self._check_input(x, -1, self.in_features, "features")
        self._check_replaced()
        rows = x if x.dim() > 2 and self.config.span > 1 else x.reshape(-1, self.in_features)
        y, selected = self._panels.linear(rows, self._parameters, self.config)
        self._observe(selected)
        y = y.view(*x.shape[:-1], self.out_features)
        return y.relu_() if self._relu else y


class PackedMIDConv2d(_Packed, MIDConv2d):
    """A :class:`midl.MIDConv2d` packed as :class:`PackedMIDLinear`."""

    _plain_class = MIDConv2d
    _panels: Panels

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (B, n, H', W'), or (n, H', W') for one image."""
        x = input  # the name that nn.Conv2d has
        window = self.stride, tuple(self._op_padding), self.dilation
        images = self._pad(x) if self._pad_before and isinstance(x, Tensor) and x.dim() == 4 else x
        if not (observers or torch.compiler.is_compiling()) and infers_plainly(images):
            prepared = self._panels.call_conv2d(images, self._parameters, self.config, window, bool(self._relu))
            if prepared is not None:
                return prepared
        self._check_watched(x)
        self._check_images(x)
        self._check_replaced()
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        self._output_size(x, images)
        y, selected = self._panels.conv2d(images, self._parameters, self.config, window)
        self._observe(selected)
        return y.relu_() if self._relu else y


class PackedMIDFFN(_Packed, MIDFFN):
    """A :class:`midl.MIDFFN` packed as :class:`PackedMIDLinear`, its ``value_weight`` and ``down_weight`` too."""

    _plain_class = MIDFFN
    _panels: FFNPanels

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output, (..., out_features)."""
        if not (observers or torch.compiler.is_compiling()) and infers_plainly(x):
            prepared = self._panels.call(x, self._parameters, self.config, self.activation)
            if prepared is not None:
                return prepared
        self._check_watched(x)
        self._check_input(x, -1, self.in_features, "features")
        self._check_replaced()
        y, selected = self._panels.ffn(
            x.reshape(-1, self.in_features), self._parameters, self.config, self.activation
        )  # fmt: skip
        self._observe(selected)
        return y.view(*x.shape[:-1], self.out_features)


class PackedReLU(nn.ReLU):
    """An nn.ReLU that is part of the packed layer in front of it: it returns its input; made by :func:`fuse_relu_`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input

    def _refuse_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise MIDLError(
            "PackedReLU: a hook: the ReLU is part of the packed layer in front of it, expected "
            "midl.serving.unpack_(model) first"
        )

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse_hook


class PackedSequential(nn.Sequential):
    """An nn.Sequential that does not call its :class:`PackedReLU`; made by :func:`fuse_relu_`."""

    def forward(self, input: Any) -> Any:
        """Return what the modules make of the input, one after the other."""
        for module in self._modules.values():
            if type(module) is not PackedReLU:
                input = module(input)  # type: ignore[misc]
        return input


_PACKED: dict[type[nn.Module], type[_Packed]] = {
    MIDLinear: PackedMIDLinear,
    MIDConv2d: PackedMIDConv2d,
    MIDFFN: PackedMIDFFN,
}


def pack_(model: nn.Module) -> list[str]:
    """Pack the MID-L layers of ``model`` once and free their plain weights, in place; return the layers' names.

    >>> model = nn.Sequential(MIDLinear(64, 128, active=0.25, group_size=16)).eval()
    >>> pack_(model)
    ['0']
    >>> with torch.no_grad():
    ...     model(torch.randn(3, 64)).shape
    torch.Size([3, 128])
    >>> unpack_(model)
    ['0']

    Layers stay as they are, and are not named, where the kernels read the plain weights (groups of few neurons; the
    light gate in bfloat16), where there are no kernels (other devices and dtypes; FFNs in bfloat16), where others may
    need the weights (parametrizations, parameters that modules share), and where they are their light path alone. A
    packed
    layer always multiplies what was selected, also where :func:`midl.kernels` ``("auto")`` would find it faster to
    multiply everything.

    Args:
        model: in ``eval()`` mode. Its layers stay the same objects; their parameters come back with :func:`unpack_`,
            the same objects too, so that an optimizer made before goes on.

    Raises:
        KernelError: the native kernels are not there.
        MIDLError: a layer is in training mode.
    """
    check_module("pack_", model)
    if reason := unavailable_reason("native"):
        raise KernelError(f"pack_: {reason}")
    layers = {name: module for name, module in model.named_modules() if _is_plain(module)}
    if training := [name for name, layer in layers.items() if layer.training]:
        raise MIDLError(f"pack_: layers {training} are in training mode, expected model.eval()")
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    packed = []
    for name, layer in layers.items():
        shared = any(users[id(parameter)] > 1 for parameter in layer.parameters(recurse=False))
        runs = ffn_runs_on_panels if isinstance(layer, MIDFFN) else runs_on_panels
        if layer.active and not shared and runs(layer._parameters, layer.config.group_size):
            _pack(layer)
            packed.append(name)
    return packed


def unpack_(model: nn.Module) -> list[str]:
    """Give the layers that :func:`pack_` packed their plain weights back, bit for bit; return the layers' names.

    Args:
        model: as :func:`pack_` left it; a model without packed layers stays as it is.
    """
    check_module("unpack_", model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _Packed)}
    for layer in layers.values():
        for relu in layer.__dict__.pop("_relu", ()):
            relu.__class__ = nn.ReLU
        for name, values in layer._panels.unpack().items():
            placeholder, parameter = layer._parameters[name], layer._plain[name]
            assert placeholder is not None
            parameter.data = values
            parameter.requires_grad_(placeholder.requires_grad)
            layer._parameters[name] = parameter
        del layer._panels, layer._plain
        layer.__class__ = layer._plain_class  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, PackedSequential) and not any(type(child) is PackedReLU for child in module):
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return list(layers)


def fuse_relu_(model: nn.Module, pairs: Iterable[tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """Let packed layers compute the nn.ReLU that takes their output, in place; return (layer, ReLU) by name.

    >>> model = nn.Sequential(MIDLinear(64, 128, active=0.25, group_size=16), nn.ReLU(), nn.Linear(128, 10)).eval()
    >>> pack_(model), fuse_relu_(model)
    (['0'], [('0', '1')])
    >>> unpack_(model)
    ['0']

    The model's outputs keep their bits. The layer's own output is now the ReLU's, which returns its input. For small
    layers an operator less is time saved. :func:`unpack_` makes both what they were.

    Found are pairs of a layer that :func:`pack_` packed and its nn.ReLU, each called once, without hooks, where nothing
    else takes the layer's output.

    Args:
        model: as :func:`pack_` left it.
        pairs: names of layer and ReLU, where torch.fx cannot follow the model's forward; None: found by torch.fx.

    Raises:
        MIDLError: torch.fx cannot follow the model, or a pair is not as above.
    """
    check_module("fuse_relu_", model)
    modules = dict(model.named_modules())
    if pairs is not None:
        found = named_pairs("fuse_relu_", modules, pairs)
    elif any(type(module) is nn.ReLU for module in modules.values()):
        found = find_pairs("fuse_relu_", model, modules, _is_rectified)
    else:
        found = []
    for layer_name, relu_name in found:
        layer, relu = modules[layer_name], modules[relu_name]
        if not _is_rectified(layer, relu):
            raise MIDLError(
                f"fuse_relu_: pair ({layer_name!r}, {relu_name!r}) is a {type(layer).__name__} and a "
                f"{type(relu).__name__}, expected a layer that midl.serving.pack_ packed and an nn.ReLU "
                "without hooks"
            )
    for layer_name, relu_name in found:
        layer, relu = modules[layer_name], modules[relu_name]
        layer._relu = (relu,)  # type: ignore[assignment]
        relu.__class__ = PackedReLU
    for module in modules.values():
        if type(module) is nn.Sequential and any(type(child) is PackedReLU for child in module):
            module.__class__ = PackedSequential
    return found


def factor_(model: nn.Module) -> list[str]:
    """Replace the layers that are their light path alone by its two thin dense layers, in place; return their names.

    >>> model = nn.Sequential(MIDLinear(64, 128, active=0, rank=8), nn.ReLU(), MIDLinear(128, 10))
    >>> factor_(model)
    ['0']
    >>> sum(p.numel() for p in model[0].parameters())
    1664

    Such layers (``active=0``, as :func:`midl.adapt` makes them) keep their full weight for a later budget. Here it
    goes, and with it the way back: what is left is plain torch, computes the same, and is as small in memory and in a
    file as it is fast. Parameters stay the same objects, but for the ``light_up`` of convolutions.

    Layers stay as they are, and are not named, where they are parametrized or have hooks.

    Args:
        model: in any mode, on any device; it must not itself be such a layer.

    Raises:
        MIDLError: ``model`` is no module, or is itself a layer to replace.
    """
    check_module("factor_", model)
    layers = {name: module for name, module in model.named_modules() if _is_light_alone(module)}
    if "" in layers:
        raise MIDLError(
            f"factor_: model is itself a {type(model).__name__} and cannot be replaced in place, expected a module "
            "that contains it, nn.Sequential(model) for instance"
        )
    replace_modules(model, {id(layer): Factors.of(layer) for layer in layers.values()})
    return list(layers)


def _is_rectified(layer: nn.Module, relu: nn.Module) -> bool:
    return (
        isinstance(layer, (PackedMIDLinear, PackedMIDConv2d))
        and not layer._relu
        and type(relu) is nn.ReLU
        and not has_hooks(relu)
    )


def _is_plain(module: nn.Module) -> TypeGuard[MIDLayer]:
    # The type of a parametrized layer is another.
    return type(module) in _PACKED


def _is_light_alone(module: nn.Module) -> TypeGuard[MIDLayer]:
    return _is_plain(module) and module.active == 0 and not has_hooks(module)


@torch.no_grad()
def _pack(layer: MIDLayer) -> None:
    if isinstance(layer, MIDFFN):
        panels: Panels | FFNPanels = FFNPanels(layer._parameters)
    else:
        panels = Panels(layer._parameters, layer.config.group_size)
    layer._panels = panels  # type: ignore[assignment]
    plain: dict[str, nn.Parameter] = {}
    for name in panels.forms:
        parameter = layer._parameters[name]
        assert parameter is not None
        layer._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        parameter.data = parameter.new_empty(0)
        plain[name] = parameter
    layer._plain = plain  # type: ignore[assignment]
    layer.__class__ = _PACKED[type(layer)]  # type: ignore[assignment]
