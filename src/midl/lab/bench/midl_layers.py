"""Our side of the contests: random MID-L layers, their parity with the reference, what they must compute and move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import midl
from midl.lab.bench.parity import LIMITS, Parity, compare_selection, error_ratio
from midl.layers.base import MIDLayer, observers
from midl.ops.conv2d import output_positions
from midl.ops.dispatch import resolve

__all__ = [
    "check_ffn", "check_forward", "contender_name", "count_flops", "implementation", "make_conv2d", "make_ffn",
    "make_linear", "traffic",
]  # fmt: skip


def make_linear(in_features: int, out_features: int, dtype: torch.dtype, **choices: Any) -> midl.MIDLinear:
    """Return a MIDLinear with random weights whose gate ranks groups anew for each input row."""
    layer = midl.MIDLinear(in_features, out_features, device="meta", dtype=dtype, **choices)
    return _randomise(layer.to_empty(device="cpu"))


def make_conv2d(
    in_channels: int, out_channels: int, kernel_size: int, dtype: torch.dtype, **choices: Any
) -> midl.MIDConv2d:
    """Return a same-size MIDConv2d with random weights; see :func:`make_linear`."""
    padding = kernel_size // 2
    layer = midl.MIDConv2d(
        in_channels, out_channels, kernel_size, padding=padding, device="meta", dtype=dtype, **choices
    )
    return _randomise(layer.to_empty(device="cpu"))


def make_ffn(features: int, hidden: int, **choices: Any) -> midl.MIDFFN:
    """Return a MIDFFN with random weights; see :func:`make_linear`."""
    return _randomise(midl.MIDFFN(features, hidden, device="meta", **choices).to_empty(device="cpu"))


def _randomise(layer: Any) -> Any:
    # An SVD start would take longer than the benchmark and change no time: only the selection's spread matters.
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) / math.sqrt(fan_in))
    return layer.eval().requires_grad_(False)


def contender_name(kernel: str, **choices: Any) -> str:
    """Return the name of one of our contenders.

    >>> contender_name("auto", G=32, active=0.45)
    'midl G=32 active=0.45'
    """
    parts = ["midl"] if kernel == "auto" else [f"midl[{kernel}]"]
    return " ".join([*parts, *(f"{name}={value}" for name, value in choices.items())])


def implementation(layer: MIDLayer, x: Tensor, kernel: str, *, backward: bool = False) -> str:
    """Return which implementation of the op runs for ``x`` when ``kernel`` is asked for.

    Args:
        layer: the layer.
        x: its input.
        kernel: a name for :func:`midl.kernels`.
        backward: name that of the backward pass too, where it is another.
    """
    op = "linear" if isinstance(layer, midl.MIDLinear) else "conv2d" if isinstance(layer, midl.MIDConv2d) else "ffn"
    c = layer.config
    call: dict[str, Any] = {"weight": layer.weight, "k": layer.num_selected, "group_size": c.group_size}
    if op != "ffn":
        call["span"] = c.span
    if isinstance(layer, midl.MIDConv2d):
        call["positions"] = output_positions(x, layer.weight, layer.stride, layer.padding, layer.dilation)
    with midl.kernels(kernel):
        names = [_implementation_name(resolve(op, x, **call))]
        if backward:
            names.append(_implementation_name(resolve(f"{op}_backward", x, **call, ste=c.ste)))
    return names[0] if len(set(names)) == 1 else f"{names[0]}, backward {names[1]}"


def _implementation_name(run: Callable[..., Any]) -> str:
    return run.__module__.removeprefix("midl.ops.").split(".")[0]


def run_observed(layer: MIDLayer, x: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Return the layer's output and the groups it selected."""
    seen: list[Tensor] = []

    def observe(_: MIDLayer, selected: Tensor) -> None:
        seen.append(selected)

    observers.append(observe)
    try:
        with midl.kernels(kernel):
            return layer(x), seen[0]
    finally:
        observers.remove(observe)


@torch.no_grad()
def check_forward(layer: MIDLayer, x: Tensor, kernel: str) -> Parity:
    """Compare output and selection with the reference's.

    Where the two swapped groups that tie within working precision, those groups' outputs are not compared.
    """
    output, selected = run_observed(layer, x, kernel)
    expected, selected_expected = run_observed(layer, x, "reference")
    choice, agree = compare_selection(selected, selected_expected, _gate_logits(layer, x), x.dtype)
    if not choice.ok:
        return Parity(choice.error, choice.limit, "selection")
    neurons = agree.repeat_interleave(layer.config.group_size, dim=-1)
    if x.dim() == 4:
        neurons = neurons.permute(0, 3, 1, 2)
    error = error_ratio(output * neurons, expected * neurons)
    return Parity(error, LIMITS[x.dtype], choice.detail)


@torch.no_grad()
def check_ffn(layer: midl.MIDFFN, x: Tensor, kernel: str) -> Parity:
    """Compare output and selection with the reference's; one row in a hundred may have swapped groups that tie."""
    output, selected = run_observed(layer, x, kernel)
    expected, selected_expected = run_observed(layer, x, "reference")
    agree = (selected == selected_expected).all(-1)
    swapped = int((~agree).sum())
    if swapped > len(x) / 100:
        return Parity(swapped / len(x), 0.01, "rows with another selection")
    return Parity(error_ratio(output[agree], expected[agree]), LIMITS[x.dtype], f"{swapped} rows swapped near ties")


def _gate_logits(layer: MIDLayer, x: Tensor) -> Tensor:
    """Return the projection gate's logits (..., N) in float64."""
    assert layer.gate_weight is not None
    assert layer.gate_bias is not None
    x, down = x.double(), layer.light_down.double()
    if isinstance(layer, midl.MIDConv2d):
        assert isinstance(layer.padding, tuple)
        code = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation).permute(0, 2, 3, 1)
    else:
        code = x @ down.T
    return F.linear(code, layer.gate_weight.double(), layer.gate_bias.double())


def count_flops(call: Callable[[], object]) -> int:
    """Return the operations of one call by the ops' formulas; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def traffic(layer: MIDLayer, inputs: int, outputs: int, choices: int) -> float:
    """Return the bytes that one call must move at least: weights that some input selected, input and output.

    Args:
        layer: the layer.
        inputs: elements of the input.
        outputs: elements of the output.
        choices: independent selections of the call; with c of them, 1 - (1 - k/N)^c of the groups are wanted.
    """
    wanted = 1 - (1 - layer.num_selected / layer.num_groups) ** choices
    others = sum(p.numel() for p in layer.parameters()) - layer.weight.numel()
    return (wanted * layer.weight.numel() + others + inputs + outputs) * layer.weight.element_size()
