"""MIDLinear: a drop-in for nn.Linear that computes only the neuron groups an input needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.config import CONVERSION, MIDConfig, check_positive_int
from midl.errors import MIDLError
from midl.layers.base import MIDLayer, observers
from midl.ops.linear import linear
from midl.ops.native_call import call_prepared

__all__ = ["MIDLinear"]


class MIDLinear(MIDLayer):
    r"""Linear layer whose input picks the neuron groups that take the full path; the others keep a low-rank value.

    >>> layer = MIDLinear(64, 128, active=0.25, group_size=16)
    >>> layer(torch.randn(7, 5, 64)).shape
    torch.Size([7, 5, 128])
    >>> layer
    MIDLinear(64, 128, bias=True, active=0.25, rank=13, group_size=16)

    With z = x @ light_down.T, l = z @ light_up.T, f = x @ weight.T and gate logits s, the k groups of largest s have
    m = 1 and the output is ``y = l + m * sigmoid(s) * (f - l) + bias``. ``eval()`` computes the same function as
    ``train()`` without noise.

    Shapes: input (..., in_features) with any leading dimensions, also none or empty; output (..., out_features).
    With ``span > 1`` the second-to-last dimension is the sequence.

    Parameters: ``weight`` (n, d) and ``bias`` (n) as in nn.Linear, ``light_down`` (r, d), ``light_up`` (n, r) and, for
    the projection gate, ``gate_weight`` (n / group_size, r) and ``gate_bias`` (n / group_size).

    Args:
        in_features: d.
        out_features: n.
        bias: whether to learn an additive bias.
        config: the choices below in one object; ``None`` for the defaults. Keywords override its fields.
        device: of the parameters.
        dtype: of the parameters.
        **choices: fields of :class:`midl.MIDConfig`: active, rank, flops_ratio, group_size, span, gate,
            interpolation, ste, noise.

    Raises:
        MIDLError: sizes that don't fit or a budget that cannot be met; the message says what would.

    Source: arXiv 2505.11416; docs/formula.md has the formula in full.
    """

    dense_family = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: MIDConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        check_positive_int("MIDLinear", "in_features", in_features)
        check_positive_int("MIDLinear", "out_features", out_features)
        self.in_features, self.out_features = in_features, out_features
        config = (config or MIDConfig()).replace(**choices)
        if config.select != "position":
            raise MIDLError("MIDLinear: select='image' is for convolutions, expected 'position'")
        self._setup((out_features, in_features), bias, config, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: MIDConfig | None = None, **choices: Any) -> MIDLinear:
        """Return a MID-L layer that keeps ``linear``'s own ``weight`` and ``bias`` parameters.

        The light path is the truncated SVD of the weight, so the layer works without training.

        >>> dense = nn.Linear(64, 128)
        >>> layer = MIDLinear.from_linear(dense, active=0.3)
        >>> layer.weight is dense.weight
        True

        Args:
            linear: the trained layer; it is left as it was and shares its parameters with the result.
            config: how to convert; default: the light gate and hard interpolation. Keywords override its fields.

        Raises:
            MIDLError: ``linear`` is no nn.Linear, or the configuration does not fit its sizes.
        """
        if not isinstance(linear, nn.Linear):
            raise MIDLError(f"MIDLinear.from_linear: linear is a {type(linear).__name__}, expected nn.Linear")
        layer = cls._like(linear, config or CONVERSION, **choices)
        layer.reset_light_path()
        return layer

    @classmethod
    def _like(cls, linear: nn.Linear, config: MIDConfig | None = None, **choices: Any) -> MIDLinear:
        """:meth:`from_linear` with light path and gate left uninitialised."""
        return cls(
            linear.in_features, linear.out_features, linear.bias is not None, config=config, device="meta",
            dtype=linear.weight.dtype, **choices,
        )._adopt(linear)  # fmt: skip

    def to_linear(self) -> nn.Linear:
        """Return an nn.Linear that shares this layer's ``weight`` and ``bias``.

        >>> layer = MIDLinear(64, 128)
        >>> layer.to_linear().weight is layer.weight
        True

        Raises:
            MIDLError: the layer is parametrized.
        """
        self._check_plain("MIDLinear.to_linear")
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = self.weight
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (..., out_features)."""
        x = input  # the name that nn.Linear has
        if self.config.active == 0 and not (observers or torch.compiler.is_compiling()):
            try:
                return self._light_alone(x)
            except (RuntimeError, TypeError):
                pass  # what is wrong is found below
        if not torch.compiler.is_compiling() and not observers and not (self.training and self.config.noise > 0):
            prepared = call_prepared(x, self._parameters, self.config)
            if prepared is not None:
                return prepared
        if isinstance(x, Tensor) and x.dim() == 0:
            raise MIDLError(f"MIDLinear: input is 0-dimensional, expected (..., {self.in_features})")
        self._check_input(x, -1, self.in_features, "features")
        c = self.config
        if c.active == 0:
            if observers:
                self._observe(x.new_empty((*x.shape[:-1], 0), dtype=torch.int32))
            return self._light_alone(x)
        # A sequence keeps its axis only where positions share a selection.
        rows = x if x.dim() == 2 or (x.dim() > 2 and c.span > 1) else x.reshape(-1, self.in_features)
        noise = None
        if self.training and c.noise > 0:
            noise = self._draw_noise(x, (*rows.shape[:-2], -(-rows.shape[-2] // c.span)))
        y, selected = self._call_op(
            linear, self._op_tensors(rows), noise, self.num_slots, c.group_size, c.span, c.interpolation, c.ste,
            c.threshold,
        )  # fmt: skip
        if observers:
            self._observe(selected)
        return y if rows is x else y.view(*x.shape[:-1], self.out_features)

    def _light_alone(self, x: Tensor) -> Tensor:
        """Return the light path's output, for layers that select nothing."""
        return F.linear(F.linear(x, self.light_down), self.light_up, self.bias)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._config_repr()}"
