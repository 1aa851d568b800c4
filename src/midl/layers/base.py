"""MIDLayer: what the linear layer, the convolution and the FFN share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from midl.config import MIDConfig, auto_rank, check_active, layer_macs, num_active_groups
from midl.errors import DTypeError, KernelError, MIDLError
from midl.layers.lowrank import truncated_svd
from midl.ops import native
from midl.ops.dispatch import is_plain_inference

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MIDLayer", "observers"]

# Called with (layer, selected) after each forward pass; a list of the process, so that layers stay copyable.
observers: list[Callable[[MIDLayer, Tensor], None]] = []


def _autocast(x: Tensor) -> bool:
    """Return whether autocast casts ``x``: as for torch's own layers, float64 stays."""
    device = x.device.type
    return x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


class MIDLayer(nn.Module):
    """Base of the MID-L layers: parameters of light path and gate, the budget and who watches the selection."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    _tensor_names: ClassVar[tuple[str, ...]] = (
        "weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias",
    )  # fmt: skip
    """In the op's order."""

    config: MIDConfig
    """The configuration, with ``rank`` resolved to a number and ``active`` as last set."""

    def _setup(self, weight_shape: tuple[int, ...], bias: bool, config: MIDConfig, device: Any, dtype: Any) -> None:
        """Validate the configuration against the layer's sizes and create the parameters, uninitialised."""
        owner, (n, *fan_in_shape) = type(self).__name__, weight_shape
        fan_in, light_width = math.prod(fan_in_shape), self._light_width(n)
        if dtype is not None and not dtype.is_floating_point:
            raise DTypeError(f"{owner}: dtype={dtype}, expected a floating-point dtype")
        check_active(owner, config.active, zero=self.may_be_light_alone)
        if n % config.group_size:
            raise MIDLError(f"{owner}: group_size={config.group_size} does not divide {self._width_name}={n}")
        rank = config.rank
        if rank == "auto":
            rank = auto_rank(
                fan_in, n, active=config.active, group_size=config.group_size, gate=config.gate,
                flops_ratio=config.flops_ratio, owner=owner, neuron_macs=self._neuron_macs(fan_in),
                light_width=light_width,
            )  # fmt: skip
        elif rank > min(fan_in, light_width):
            raise MIDLError(
                f"{owner}: rank={rank}, expected at most min(fan_in, {self._light_name})={min(fan_in, light_width)}"
            )
        self.config = config.replace(rank=rank)
        self._fan_in = tuple(fan_in_shape)
        groups = n // config.group_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(*weight_shape)
        self.register_parameter("bias", parameter(n) if bias else None)
        self.light_down = parameter(rank, *fan_in_shape)
        self.light_up = parameter(light_width, rank)
        learned_gate = config.gate == "projection"
        self.register_parameter("gate_weight", parameter(groups, rank) if learned_gate else None)
        self.register_parameter("gate_bias", parameter(groups) if learned_gate else None)

    _width_name = "out_features"

    @property
    def _light_name(self) -> str:
        """Name of the light path's width."""
        return self._width_name

    def _light_width(self, neurons: int) -> int:
        """Return the outputs of the light path."""
        return neurons

    def _neuron_macs(self, fan_in: int) -> int:
        """Return the multiply-adds of one neuron on the full path."""
        return fan_in

    @property
    def macs(self) -> int:
        """Multiply-adds for one input row (one output position of a convolution); with a threshold, on average."""
        n, fan_in = self.weight.shape[0], self.weight[0].numel()
        return layer_macs(
            fan_in, n, self.rank, num_selected=self.num_selected, group_size=self.config.group_size,
            gate=self.config.gate, neuron_macs=self._neuron_macs(fan_in), light_width=self._light_width(n),
        )  # fmt: skip

    @property
    def dense_macs(self) -> int:
        """Multiply-adds of the dense layer for one input row."""
        return self.weight.shape[0] * self._neuron_macs(self.weight[0].numel())

    dense_family: str
    """The dense layer that this one goes back to, by its name in :mod:`midl.conversion.families`."""

    may_be_light_alone = True
    """Whether ``active`` may be 0."""

    @property
    def rank(self) -> int:
        """Width of the low-rank code."""
        return self.light_down.shape[0]

    @property
    def num_groups(self) -> int:
        """Groups of neurons to choose from, N."""
        return self.weight.shape[0] // self.config.group_size

    @property
    def num_selected(self) -> int:
        """Groups that each input selects, k; with a threshold, the average that it was calibrated for."""
        return num_active_groups(self.config.active, self.num_groups)

    @property
    def num_slots(self) -> int:
        """Groups that each input selects; with a threshold, the most that one may."""
        return self.config.num_slots(self.num_groups)

    @property
    def active(self) -> float:
        """Fraction of the groups that takes the full path, 0 for none. Assign to change the budget; the weights stay.

        A threshold belongs to the budget that it was calibrated for: assigning takes it away.
        """
        return self.config.active

    @active.setter
    def active(self, value: float) -> None:
        check_active(type(self).__name__, value, zero=self.may_be_light_alone)
        self.config = self.config.replace(active=value, threshold=None, most=1.0)

    @property
    def threshold(self) -> float | None:
        """Gate logit that a group must reach to be selected; None: all inputs select ``num_selected`` groups."""
        return self.config.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self.config = self.config.replace(threshold=value, most=1.0 if value is None else self.config.most)

    def reset_parameters(self) -> None:
        """Draw ``weight`` and ``bias`` as the dense layer does, then start light path and gate from them."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_light_path()

    @torch.no_grad()
    def reset_light_path(self) -> None:
        """Set the light path to the truncated SVD of ``weight``; the gate then ranks groups by mean light output."""
        if self.weight.is_meta:
            return
        down, up = truncated_svd(self.weight.flatten(1), self.rank)
        self.light_down.copy_(down.view_as(self.light_down))
        self.light_up.copy_(up)
        if self.gate_weight is not None and self.gate_bias is not None:
            size = self.config.group_size
            self.gate_weight.copy_(self.light_up.unflatten(0, (-1, size)).mean(1))
            self.gate_bias.copy_(self.bias.view(-1, size).mean(1) if self.bias is not None else torch.tensor(0.0))

    def _adopt(self, dense: nn.Linear | nn.Conv2d) -> Self:
        """Take over a dense layer's parameters, as the very same objects, device and training flag included."""
        self.to_empty(device=dense.weight.device)
        if isinstance(dense, nn.Conv2d) and not dense.weight.is_contiguous():
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weight = dense.weight  # type: ignore[assignment]
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        return self.train(dense.training)

    def _check_plain(self, method: str) -> None:
        """Raise if a parametrization stands between the layer and its weights: a dense layer would lose it."""
        if nn.utils.parametrize.is_parametrized(self):
            names = ", ".join(self.parametrizations)  # type: ignore[arg-type]
            raise MIDLError(
                f"{method}: the layer's {names} is parametrized, expected torch.nn.utils.parametrize."
                "remove_parametrizations first"
            )

    def _check_input(self, x: Tensor, axis: int, expected: int, name: str) -> None:
        """Raise unless the layer can compute with ``x``; what is right passes with as few look-ups as possible."""
        weight = self.weight
        if (
            isinstance(x, Tensor)
            and x.layout is torch.strided
            and not x.is_nested
            and x.shape[axis] == expected
            and x.device == weight.device
            and (x.dtype is weight.dtype or (x.dtype.is_floating_point and _autocast(x)))
        ):
            return
        owner = type(self).__name__
        if not isinstance(x, Tensor):
            raise MIDLError(f"{owner}: input is a {type(x).__name__}, expected a torch.Tensor")
        if x.is_nested:
            raise MIDLError(f"{owner}: input is a nested tensor, expected a padded one (torch.nested.to_padded_tensor)")
        if x.layout is not torch.strided:
            raise MIDLError(f"{owner}: input has layout {x.layout}, expected a dense tensor (x.to_dense())")
        if not x.dtype.is_floating_point:
            raise DTypeError(f"{owner}: input has dtype {x.dtype}, expected {weight.dtype}")
        if x.dtype != weight.dtype and not _autocast(x):
            raise DTypeError(
                f"{owner}: input has dtype {x.dtype}, expected {weight.dtype} like the weight "
                "(convert one with .to(dtype), or use torch.autocast)"
            )
        if x.device != weight.device:
            raise MIDLError(f"{owner}: input is on {x.device}, expected {weight.device} like the weight")
        raise MIDLError(f"{owner}: input of shape {tuple(x.shape)} has {x.shape[axis]} {name}, expected {expected}")

    def _op_tensors(self, x: Tensor) -> tuple[Any, ...]:
        """Return x and the parameters in the op's order, in autocast's dtype where autocast is on."""
        return self._cast((x, self.weight, self.bias, self.light_down, self.light_up, self.gate_weight, self.gate_bias))

    def _cast(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``tensors``, of which the first is the input, in autocast's dtype where autocast is on."""
        x = tensors[0]
        if _autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            keeps = x.is_cpu and is_plain_inference(x, self.weight)
            cast = native.cast_parameter if keeps else Tensor.to
            return (x.to(dtype), *(t if t is None else cast(t, dtype) for t in tensors[1:]))
        return tensors

    def _call_op(self, op: Any, tensors: tuple[Any, ...], *options: Any) -> tuple[Tensor, Tensor]:
        """Return ``op(*tensors, *options)``, y and selected; an error where torch has no derivative of it.

        torch's custom ops have reverse-mode rules only. It says so badly under torch.func.grad, and under forward mode
        not at all: the tangents would be zero.
        """
        x = tensors[0]
        if any(t is not None and (t.dtype is not x.dtype or t.device != x.device) for t in tensors[1:]):
            raise self._mismatch(x, tensors)
        self._check_shapes(tensors[1:])
        if torch.compiler.is_compiling():
            return op(*tensors, *options)
        if forward_ad._current_level >= 0 and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
        ):
            raise KernelError(
                f"{type(self).__name__}: forward-mode derivatives (jvp) are not implemented, expected reverse mode: "
                "backward() or torch.autograd.grad"
            )
        try:
            return op(*tensors, *options)
        except RuntimeError as error:
            if "functorch transforms" not in str(error):
                raise
            raise KernelError(
                f"{type(self).__name__}: torch.func.grad, vjp, jacrev and hessian are not implemented, expected "
                "backward() or torch.autograd.grad (torch.func.vmap and functional_call do work)"
            ) from error

    def _mismatch(self, x: Tensor, tensors: tuple[Any, ...]) -> MIDLError:
        """Return the error for a parameter whose dtype or device is not the input's, as the op sees both."""
        at = next(
            i for i, t in enumerate(tensors) if t is not None and (t.dtype is not x.dtype or t.device != x.device)
        )
        name, t = self._tensor_names[at - 1], tensors[at]
        if t.is_meta and not x.is_meta:
            return MIDLError(
                f"{type(self).__name__}: {name} is on the meta device, expected {x.device} like the input "
                "(to_empty(device=...), then load_state_dict or reset_parameters(); after loading dense weights "
                "alone, reset_light_path())"
            )
        if t.device != x.device:
            return MIDLError(f"{type(self).__name__}: {name} is on {t.device}, expected {x.device} like the input")
        return DTypeError(f"{type(self).__name__}: {name} has dtype {t.dtype}, expected {x.dtype} like the input")

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the parameters in the op's order, of those that the layer may lack too."""
        n, rank = getattr(self, self._width_name), cast(int, self.config.rank)
        groups = n // self.config.group_size
        return ((n, *self._fan_in), (n,), (rank, *self._fan_in), (n, rank), (groups, rank), (groups,))

    def _check_shapes(self, parameters: tuple[Any, ...]) -> None:
        """Raise where a parameter has another shape than the layer was made with: kernels would read past its end."""
        shapes = self._shapes()
        for i, t in enumerate(parameters):
            if t is not None and t.shape != shapes[i]:
                raise MIDLError(
                    f"{type(self).__name__}: {self._tensor_names[i]} has shape {tuple(t.shape)}, expected {shapes[i]}"
                )

    def _draw_noise(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the exploration noise of a training step."""
        return torch.randn((*shape, self.num_groups), device=x.device, dtype=torch.float32) * self.config.noise

    def _observe(self, selected: Tensor) -> None:
        for observer in observers:
            observer(self, selected)

    def _config_repr(self) -> str:
        c = self.config
        fields = {name: value for name, value in c.to_dict().items() if value != getattr(MIDConfig(), name)}
        fields = {"active": c.active, **fields, "rank": self.rank}
        dtype = self.weight.dtype
        text = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        return text if dtype == torch.float32 else f"{text}, dtype={dtype}"
