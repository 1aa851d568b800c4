"""MIDFFN: a two-layer FFN that computes only the hidden units an input needs, in both of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from midl.config import MIDConfig, check_positive_int
from midl.errors import MIDLError
from midl.layers.base import MIDLayer, observers
from midl.layers.lowrank import truncated_svd
from midl.ops.ffn import ffn
from midl.ops.native_call import call_ffn_prepared
from midl.ops.reference_ffn import ACTIVATIONS, activate

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MIDFFN", "DenseFFN", "dense_ffn"]

# The parameters that a MIDFFN has from the dense layers, in the op's order.
DENSE_NAMES = ("weight", "bias", "value_weight", "value_bias", "down_weight", "down_bias")


class DenseFFN(nn.Module):
    """The dense twin of a :class:`MIDFFN`, with the very same parameters: act(x W + b) [* (x V + c)] D + e."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    value_weight: nn.Parameter | None
    value_bias: nn.Parameter | None
    down_weight: nn.Parameter
    down_bias: nn.Parameter | None

    def __init__(self, parameters: Mapping[str, Any], activation: str) -> None:
        super().__init__()
        for name in DENSE_NAMES:
            self.register_parameter(name, parameters[name])
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (..., out_features)."""
        hidden = activate(nn.functional.linear(x, self.weight, self.bias), self.activation)
        if self.value_weight is not None:
            hidden = hidden * nn.functional.linear(x, self.value_weight, self.value_bias)
        return nn.functional.linear(hidden, self.down_weight, self.down_bias)

    def extra_repr(self) -> str:
        """Return sizes and activation."""
        return _sizes_repr(self)


def dense_ffn(up: nn.Linear, down: nn.Linear, activation: str, value: nn.Linear | None) -> DenseFFN:
    """Return the dense FFN of trained layers, with their very parameters; an error if they don't fit together."""
    layers = {"up": up, "value": value, "down": down}
    shapes = {}
    for name, layer in layers.items():
        if layer is None and name == "value":
            continue
        if not isinstance(layer, nn.Linear):
            raise MIDLError(f"MIDFFN.from_linears: {name} is a {type(layer).__name__}, expected nn.Linear")
        shapes[name] = tuple(layer.weight.shape)
    if shapes["down"][1] != shapes["up"][0] or shapes.get("value", shapes["up"]) != shapes["up"]:
        raise MIDLError(f"MIDFFN.from_linears: weights of shapes {shapes} do not make an FFN")
    parameters = {
        "weight": up.weight, "bias": up.bias, "value_weight": None if value is None else value.weight,
        "value_bias": None if value is None else value.bias, "down_weight": down.weight, "down_bias": down.bias,
    }  # fmt: skip
    return DenseFFN(parameters, activation).train(up.training)


class MIDFFN(MIDLayer):
    r"""Two-layer FFN whose input picks the hidden units that are computed; a low-rank map stands for the others.

    >>> ffn = MIDFFN(64, 256, activation="gelu", active=0.45, group_size=16)
    >>> ffn(torch.randn(7, 5, 64)).shape
    torch.Size([7, 5, 64])
    >>> ffn
    MIDFFN(64, 256, 64, bias=True, activation='gelu', gated=False, active=0.45, rank=34, group_size=16)

    The selected hidden units cost their rows of the up-projection and their columns of the down-projection. With
    z = x @ light_down.T and gate logits s = z @ gate_weight.T + gate_bias, the k groups of largest s are computed:
    ``h = act(x @ weight.T + bias)``, times ``x @ value_weight.T + value_bias`` if gated (SwiGLU, GEGLU). Every other
    unit counts as the constant ``light_hidden``, and ``z @ light_up.T`` corrects the output for what that leaves out,
    weighted with the share of groups that were not selected. docs/formula.md has the formula in full.

    Shapes: input (..., in_features), output (..., out_features).

    Parameters: ``weight`` (m, d), ``bias`` (m), if gated ``value_weight`` (m, d) and ``value_bias`` (m),
    ``down_weight`` (n, m), ``down_bias`` (n); ``light_down`` (r, d), ``light_up`` (n, r), ``light_hidden`` (m),
    ``light_bias`` (n); ``gate_weight`` (m / group_size, r), ``gate_bias`` (m / group_size).

    Args:
        in_features: d.
        hidden_features: m.
        out_features: n; default d.
        bias: whether the layers have an additive bias.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        gated: whether the activated projection multiplies a second one.
        config: the choices below in one object; ``None`` for the defaults. Keywords override its fields.
        device: of the parameters.
        dtype: of the parameters.
        **choices: fields of :class:`midl.MIDConfig`: active, rank, flops_ratio, group_size, interpolation, ste, noise.

    Raises:
        MIDLError: sizes that don't fit, a budget that cannot be met, or a choice that is for other layers.

    Source: arXiv 2505.11416 for the selection; the block form is ours.
    """

    _tensor_names = (
        "weight", "bias", "value_weight", "value_bias", "down_weight", "down_bias", "light_down", "light_up",
        "light_hidden", "light_bias", "gate_weight", "gate_bias",
    )  # fmt: skip

    dense_family = "ffn"
    may_be_light_alone = False
    _width_name = "hidden_features"
    _light_name = "out_features"

    places: dict[str, str] | None = None
    """Where a converted block's other modules stood (:mod:`midl.conversion.blocks`); None for a module by itself."""

    part_families: dict[str, str]
    """The kinds of a converted block's layers."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        activation: str = "gelu",
        gated: bool = False,
        config: MIDConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        for name, value in (
            ("in_features", in_features), ("hidden_features", hidden_features), ("out_features", out_features),
        ):  # fmt: skip
            check_positive_int("MIDFFN", name, value)
        if activation not in ACTIVATIONS:
            raise MIDLError(f"MIDFFN: activation={activation!r}, expected one of {ACTIVATIONS}")
        config = (config or MIDConfig()).replace(**choices)
        for name, expected in (("gate", "projection"), ("span", 1), ("select", "position")):
            if getattr(config, name) != expected:
                raise MIDLError(
                    f"MIDFFN: {name}={getattr(config, name)!r}, expected {expected!r}: other layers have it"
                )
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.activation, self.gated = activation, gated
        self._setup((hidden_features, in_features), bias, config, device, dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.register_parameter("value_weight", parameter(hidden_features, in_features) if gated else None)
        self.register_parameter("value_bias", parameter(hidden_features) if gated and bias else None)
        self.down_weight = parameter(out_features, hidden_features)
        self.register_parameter("down_bias", parameter(out_features) if bias else None)
        self.light_hidden = parameter(hidden_features)
        self.light_bias = parameter(out_features)
        self.reset_parameters()

    value_weight: nn.Parameter | None
    value_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        d, h, n, rank = self.in_features, self.hidden_features, self.out_features, cast(int, self.config.rank)
        groups = h // self.config.group_size
        return (
            (h, d), (h,), (h, d), (h,), (n, h), (n,), (rank, d), (n, rank), (h,), (n,), (groups, rank), (groups,)
        )  # fmt: skip

    def _light_width(self, neurons: int) -> int:
        return self.out_features

    def _neuron_macs(self, fan_in: int) -> int:
        return fan_in * (2 if self.gated else 1) + self.out_features

    def reset_parameters(self) -> None:
        """Draw the layers' weights as nn.Linear does, then start light path and gate from them."""
        for weight, bias in (
            (self.weight, self.bias), (self.value_weight, self.value_bias), (self.down_weight, self.down_bias),
        ):  # fmt: skip
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if weight is not None and bias is not None:
                bound = 1 / math.sqrt(weight.shape[1])
                nn.init.uniform_(bias, -bound, bound)
        self.reset_light_path()

    @torch.no_grad()
    def reset_light_path(self) -> None:
        """Start the gate as a low-rank guess of the pre-activations, times their columns' norms; light values at zero.

        :func:`midl.adapt` fits both to data instead, which is worth much more.
        """
        if self.weight.is_meta:
            return
        norms = self.down_weight.norm(dim=0)
        down, up = truncated_svd(norms[:, None] * self.weight, self.rank)
        self.light_down.copy_(down)
        size = self.config.group_size
        if self.gate_weight is not None and self.gate_bias is not None:
            self.gate_weight.copy_(up.unflatten(0, (-1, size)).mean(1))
            bias = torch.zeros_like(norms) if self.bias is None else norms * self.bias
            self.gate_bias.copy_(bias.view(-1, size).mean(1))
        for tensor in (self.light_up, self.light_hidden, self.light_bias):
            tensor.zero_()

    @classmethod
    def from_linears(
        cls, up: nn.Linear, down: nn.Linear, *, activation: str = "gelu", value: nn.Linear | None = None,
        config: MIDConfig | None = None, **choices: Any,
    ) -> MIDFFN:  # fmt: skip
        """Return an FFN that keeps the very weights and biases of trained layers.

        >>> up, down = nn.Linear(64, 256), nn.Linear(256, 64)
        >>> MIDFFN.from_linears(up, down, activation="relu", active=0.3).down_weight is down.weight
        True

        Args:
            up: the layer whose output is activated; left as it was.
            down: from the hidden units to the output; left as it was.
            activation: between them.
            value: for gated FFNs, the layer whose output the activated one multiplies.
            config: how to convert; keywords override its fields. Use ``interpolation="hard"`` to give the selected
                units their dense values.

        Raises:
            MIDLError: layers that don't fit together or with the configuration.
        """
        layer = cls._like(dense_ffn(up, down, activation, value), config, **choices)
        layer.reset_light_path()
        return layer

    @classmethod
    def _like(cls, dense: DenseFFN, config: MIDConfig | None = None, **choices: Any) -> MIDFFN:
        """Return the MID-L twin of ``dense`` with its very parameters; light path and gate uninitialised."""
        (hidden, d), n = dense.weight.shape, dense.down_weight.shape[0]
        return cls(
            d, hidden, n, activation=dense.activation, gated=dense.value_weight is not None, config=config,
            device="meta", dtype=dense.weight.dtype, **choices,
        )._adopt(dense)  # fmt: skip

    def _adopt(self, dense: Any) -> Self:
        self.to_empty(device=dense.weight.device)
        for name in DENSE_NAMES:
            self.register_parameter(name, getattr(dense, name))
        return self.train(dense.training)

    def to_dense(self) -> DenseFFN:
        """Return the dense module that shares this layer's weights.

        Raises:
            MIDLError: the layer is parametrized.
        """
        self._check_plain("MIDFFN.to_dense")
        parameters = {name: getattr(self, name) for name in DENSE_NAMES}
        return DenseFFN(parameters, self.activation).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the FFN's output, (..., out_features)."""
        if not (observers or torch.compiler.is_compiling() or (self.training and self.config.noise > 0)):
            prepared = call_ffn_prepared(x, self._parameters, self.config, self.activation)
            if prepared is not None:
                return prepared
        if isinstance(x, Tensor) and x.dim() == 0:
            raise MIDLError(f"MIDFFN: input is 0-dimensional, expected (..., {self.in_features})")
        self._check_input(x, -1, self.in_features, "features")
        c = self.config
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        noise = self._draw_noise(x, (rows.shape[0],)) if self.training and c.noise > 0 else None
        y, selected = self._call_op(
            ffn, self._op_tensors(rows), noise, self.num_slots, c.group_size, self.activation, c.interpolation, c.ste,
            c.threshold,
        )  # fmt: skip
        if observers:
            self._observe(selected)
        return y if rows is x else y.view(*x.shape[:-1], self.out_features)

    def _op_tensors(self, x: Tensor) -> tuple[Any, ...]:
        return self._cast((
            x, self.weight, self.bias, self.value_weight, self.value_bias, self.down_weight, self.down_bias,
            self.light_down, self.light_up, self.light_hidden, self.light_bias, self.gate_weight, self.gate_bias,
        ))  # fmt: skip

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"{_sizes_repr(self)}, {self._config_repr()}"


def _sizes_repr(ffn: Any) -> str:
    (hidden, d), n = ffn.weight.shape, ffn.down_weight.shape[0]
    return (
        f"{d}, {hidden}, {n}, bias={ffn.bias is not None}, activation={ffn.activation!r}, "
        f"gated={ffn.value_weight is not None}"
    )
