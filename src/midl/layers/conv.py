"""MIDConv2d: a drop-in for nn.Conv2d that computes only the channel groups each output position (or image) needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.config import CONVERSION, MIDConfig, check_positive_int
from midl.errors import MIDLError
from midl.layers.base import MIDLayer, observers
from midl.ops.conv2d import conv2d, output_size
from midl.ops.native_call import call_prepared

__all__ = ["MIDConv2d"]

Pair = int | tuple[int, int]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class MIDConv2d(MIDLayer):
    r"""2-D convolution whose output channels are computed in full only where the input needs them.

    >>> layer = MIDConv2d(64, 128, 3, padding=1, active=0.45, group_size=16)
    >>> layer(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 128, 8, 8])

    The code is a kh x kw convolution to ``rank`` channels, the light path a 1 x 1 convolution of the code, the gate a
    1 x 1 of the code (``select="position"``: every output pixel chooses) or of its average over the image
    (``select="image"``: one choice per image). ``span`` neighbours along an image row may share a choice.

    Shapes: input (B, C, H, W) or (C, H, W), any memory format; output (B, n, H', W') as for nn.Conv2d.

    Parameters: ``weight`` (n, C, kh, kw) and ``bias`` (n) as in nn.Conv2d, ``light_down`` (r, C, kh, kw), ``light_up``
    (n, r) and, for the projection gate, ``gate_weight`` (n / group_size, r) and ``gate_bias`` (n / group_size).

    Args:
        in_channels: this and the next as for nn.Conv2d.
        out_channels: neurons, n.
        kernel_size: of the filters.
        stride: between output positions.
        padding: also "same" or "valid".
        dilation: between taps.
        groups: must be 1.
        bias: whether there is one.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        config: the choices below in one object; ``None`` for the defaults. Keywords override its fields.
        device: of the parameters.
        dtype: of the parameters.
        **choices: fields of :class:`midl.MIDConfig`.

    Raises:
        MIDLError: sizes that don't fit, grouped convolutions, or a budget that cannot be met.

    Source: arXiv 2505.11416 for linear layers; the convolution is ours (docs/formula.md).
    """

    _width_name = "out_channels"
    dense_family = "conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        config: MIDConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        check_positive_int("MIDConv2d", "in_channels", in_channels)
        check_positive_int("MIDConv2d", "out_channels", out_channels)
        if groups != 1:
            raise MIDLError(
                f"MIDConv2d: groups={groups}, expected 1 (keep grouped and depthwise convolutions dense; "
                "midl.convert_ leaves them alone)"
            )
        if padding_mode not in _PADDING_MODES:
            raise MIDLError(f"MIDConv2d: padding_mode={padding_mode!r}, expected one of {_PADDING_MODES}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        self.padding_mode = padding_mode
        self.padding = self._resolve_padding(padding)
        shape = (out_channels, in_channels, *self.kernel_size)
        self._setup(shape, bias, (config or MIDConfig()).replace(**choices), device, dtype)
        self.reset_parameters()

    def _resolve_padding(self, padding: Pair | str) -> tuple[int, int] | str:
        """Validate the padding and work out what the op pads and what is padded before it."""
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise MIDLError(f"MIDConv2d: padding={padding!r}, expected an int, a pair of ints, 'same' or 'valid'")
            if padding == "same" and self.stride != (1, 1):
                raise MIDLError(f"MIDConv2d: stride={self.stride} with padding='same', expected stride 1")
            totals = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            padding = _pair("padding", padding, 0)
            sides = [(p, p) for p in padding]
        symmetric = all(before == after for before, after in sides)
        if symmetric and self.padding_mode == "zeros":
            self._op_padding, self._pad_before = [before for before, _ in sides], []
        else:  # F.pad wants the last axis first.
            self._op_padding, self._pad_before = [0, 0], [*sides[1], *sides[0]]
        return padding

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, config: MIDConfig | None = None, **choices: Any) -> MIDConv2d:
        """Return a MID-L layer that keeps ``conv``'s own ``weight`` and ``bias``; the light path is their SVD.

        >>> dense = nn.Conv2d(16, 32, 3, padding="same")
        >>> MIDConv2d.from_conv2d(dense, active=0.3, group_size=8).weight is dense.weight
        True

        Args:
            conv: the trained layer; it is left as it was and shares its parameters with the result.
            config: how to convert; default: the light gate and hard interpolation. Keywords override its fields.

        Raises:
            MIDLError: ``conv`` is no nn.Conv2d, is grouped, or the configuration does not fit its sizes.
        """
        if not isinstance(conv, nn.Conv2d):
            raise MIDLError(f"MIDConv2d.from_conv2d: conv is a {type(conv).__name__}, expected nn.Conv2d")
        layer = cls._like(conv, config or CONVERSION, **choices)
        layer.reset_light_path()
        return layer

    @classmethod
    def _like(cls, conv: nn.Conv2d, config: MIDConfig | None = None, **choices: Any) -> MIDConv2d:
        """:meth:`from_conv2d` with light path and gate left uninitialised."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, conv.bias is not None, conv.padding_mode, config=config, device="meta",
            dtype=conv.weight.dtype, **choices,
        )._adopt(conv)  # fmt: skip

    def to_conv2d(self) -> nn.Conv2d:
        """Return an nn.Conv2d that shares this layer's ``weight`` and ``bias``.

        >>> layer = MIDConv2d(16, 32, 3)
        >>> layer.to_conv2d().weight is layer.weight
        True

        Raises:
            MIDLError: the layer is parametrized.
        """
        self._check_plain("MIDConv2d.to_conv2d")
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, padding_mode=self.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
        dense.weight = self.weight
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, (B, n, H', W'), or (n, H', W') for one image."""
        x = input  # the name that nn.Conv2d has
        if self.config.active == 0 and not (observers or self._pad_before or torch.compiler.is_compiling()):
            try:
                return self._light_alone(x)
            except (RuntimeError, TypeError):
                pass  # what is wrong is found below
        if not torch.compiler.is_compiling() and not (
            observers or self._pad_before or (self.training and self.config.noise > 0)
        ):
            window = self.stride, tuple(self._op_padding), self.dilation
            prepared = call_prepared(x, self._parameters, self.config, window)
            if prepared is not None:
                return prepared
        self._check_images(x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        c = self.config
        tensors = self._op_tensors(x)
        images = self._pad(tensors[0])
        height, width = self._output_size(x, images)
        if c.active == 0:
            if observers:
                self._observe(images.new_empty((len(images), height, width, 0), dtype=torch.int32))
            return self._light_alone(images)
        per_image = c.select == "image"
        noise = None
        if self.training and c.noise > 0:
            noise = self._draw_noise(x, (len(x), 1) if per_image else (len(x), height, -(-width // c.span)))
        y, selected = self._call_op(
            conv2d, (images, *tensors[1:]), noise, self.stride, self._op_padding, self.dilation, self.num_slots,
            c.group_size, 0 if per_image else c.span, c.interpolation, c.ste, c.threshold,
        )  # fmt: skip
        if observers:
            self._observe(selected)
        return y

    def _check_images(self, x: Any) -> None:
        """Raise unless the layer can compute with x, images or one image."""
        if isinstance(x, Tensor) and x.dim() not in (3, 4):
            raise MIDLError(
                f"MIDConv2d: input of shape {tuple(x.shape)}, expected (B, {self.in_channels}, H, W) or "
                f"({self.in_channels}, H, W)"
            )
        self._check_input(x, -3, self.in_channels, "channels")

    def _pad(self, x: Tensor) -> Tensor:
        """Return images with the padding that the op does not do."""
        if not self._pad_before:
            return x
        return F.pad(x, self._pad_before, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _output_size(self, x: Tensor, images: Tensor) -> tuple[int, int]:
        """Return height and width of the output for x, ``images`` once padded."""
        height, width = (
            output_size(images.shape[2 + i], self.kernel_size[i], self.stride[i], self._op_padding[i], self.dilation[i])
            for i in (0, 1)
        )
        if height < 1 or width < 1:
            raise MIDLError(
                f"MIDConv2d: input of shape {tuple(x.shape)} is smaller than kernel_size={self.kernel_size} with "
                f"dilation={self.dilation} and padding={self.padding!r}"
            )
        return height, width

    def _light_alone(self, images: Tensor) -> Tensor:
        """Return the light path's output on padded images, for layers that select nothing."""
        code = F.conv2d(images, self.light_down, None, self.stride, tuple(self._op_padding), self.dilation)
        up = self.light_up
        return F.conv2d(code, up.view(*up.shape, 1, 1), self.bias)

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}, dilation={self.dilation}, bias={self.bias is not None}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return f"{text}, {self._config_repr()}"


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return ``value`` as a pair of ints of at least ``least``."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in pair):
        raise MIDLError(f"MIDConv2d: {name}={value!r}, expected an int or a pair of ints of at least {least}")
    return pair  # type: ignore[return-value]
