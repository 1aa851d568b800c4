"""FLOP formulas of midl's ops for torch's FlopCounterMode: two per multiply-add, as torch counts.

Forward, per input row: r d (code) + r n (light path) + r N per selection block (projection gate) + k G d (selected
neurons); an FFN's selected units also have their columns of the down-projection. Backward: the work of the sparse
rules, the recomputation of what is not saved included. With a threshold k is the most that a block may select, so that
the count is an upper bound: what blocks really select depends on the data (:func:`midl.record_activity`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["register_formulas"]

_COUNTER = "torch.utils.flop_counter"

Shape = torch.Size


def _forward(
    positions: int, blocks: int, fan_in: int, n: int, rank: int, gate_weight: Shape | None, selected: int
) -> int:
    """Return FLOPs of one layer call: ``selected`` neurons take the full path at each of ``positions``."""
    gate = 0 if gate_weight is None else math.prod(gate_weight) * blocks
    return 2 * (positions * (rank * fan_in + rank * n + selected * fan_in) + gate)


def _backward(
    positions: int, blocks: int, fan_in: int, n: int, rank: int, gate_weight: Shape | None, selected: int,
    dense: bool, needs: list[bool],
) -> int:  # fmt: skip
    """Return FLOPs of a backward call: recompute code, light and full path, then each gradient asked for."""
    need_x, need_weight, _, need_down, need_up, need_gate, need_gate_bias = needs
    gate = 0 if gate_weight is None else math.prod(gate_weight) * blocks
    recomputed = positions * (rank * fan_in + rank * n + (n if dense else selected) * fan_in) + gate
    code_grad = positions * rank * n + gate
    return 2 * (
        recomputed
        + (need_x or need_down) * code_grad
        + need_x * positions * (selected * fan_in + rank * fan_in)
        + need_weight * positions * selected * fan_in
        + need_down * positions * rank * fan_in
        + need_up * positions * rank * n
        + (need_gate or need_gate_bias) * gate
    )


def _linear(
    x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape, gate_weight: Shape | None,
    gate_bias: Any, noise: Any, k: int, group_size: int, *args: Any, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    blocks = math.prod(out_shape[1][:-1])
    rank, fan_in = light_down
    return _forward(math.prod(x[:-1]), blocks, fan_in, weight[0], rank, gate_weight, k * group_size)


def _linear_backward(
    grad_y: Shape, selected: Shape, x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape,
    gate_weight: Shape | None, gate_bias: Any, group_size: int, span: int, interpolation: str, ste: str,
    needs: list[bool], *, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    rank, fan_in = light_down
    return _backward(
        math.prod(x[:-1]), math.prod(selected[:-1]), fan_in, weight[0], rank, gate_weight,
        selected[-1] * group_size, ste == "dense", needs,
    )  # fmt: skip


def _conv2d(
    x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape, gate_weight: Shape | None,
    gate_bias: Any, noise: Any, stride: Any, padding: Any, dilation: Any, k: int, group_size: int, *args: Any,
    out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    y, selected = out_shape
    fan_in = math.prod(light_down[1:])
    return _forward(
        y[0] * y[2] * y[3], math.prod(selected[:-1]), fan_in, y[1], light_down[0], gate_weight, k * group_size
    )


def _conv2d_backward(
    grad_y: Shape, selected: Shape, x: Shape, weight: Shape, bias: Any, light_down: Shape, light_up: Shape,
    gate_weight: Shape | None, gate_bias: Any, stride: Any, padding: Any, dilation: Any, group_size: int, span: int,
    interpolation: str, ste: str, needs: list[bool], *, out_shape: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _backward(
        grad_y[0] * grad_y[2] * grad_y[3], math.prod(selected[:-1]), math.prod(light_down[1:]), weight[0],
        light_down[0], gate_weight, selected[-1] * group_size, ste == "dense", needs,
    )  # fmt: skip


def _ffn(
    x: Shape, weight: Shape, bias: Any, value_weight: Shape | None, value_bias: Any, down_weight: Shape,
    down_bias: Any, light_down: Shape, light_up: Shape, light_hidden: Any, light_bias: Any, gate_weight: Shape,
    gate_bias: Any, noise: Any, k: int, group_size: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    neuron = (1 if value_weight is None else 2) * x[-1] + down_weight[0]
    light = math.prod(light_down) + math.prod(light_up) + math.prod(gate_weight)
    return 2 * math.prod(x[:-1]) * (light + k * group_size * neuron)


def _ffn_backward(
    grad_y: Shape, selected: Shape, x: Shape, weight: Shape, bias: Any, value_weight: Shape | None, value_bias: Any,
    down_weight: Shape, down_bias: Any, light_down: Shape, light_up: Shape, light_hidden: Any, light_bias: Any,
    gate_weight: Shape, gate_bias: Any, group_size: int, activation: str, interpolation: str, ste: str,
    needs: list[bool], **kwargs: Any,
) -> int:  # fmt: skip
    """Recompute code, light map, gate and hidden units, pull the gradient through down, then each that is needed."""
    d, n, units = x[-1], down_weight[0], selected[-1] * group_size
    ups = 1 if value_weight is None else 2
    wanted = weight[0] if ste == "dense" else units
    code, light, gate = math.prod(light_down), math.prod(light_up), math.prod(gate_weight)
    need_x, need_weight, _, need_value, _, need_down, _, need_code, need_light, _, _, need_gate, _ = needs
    return 2 * math.prod(x[:-1]) * (
        code + light + gate + wanted * (ups * d + n)
        + (need_x or need_code) * (light + gate)
        + need_x * (code + ups * units * d)
        + (need_weight + need_value) * units * d
        + need_down * units * n
        + need_code * code + need_light * light + need_gate * gate
    )  # fmt: skip


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function once a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_then_call(module: ModuleType) -> None:
            load(module)
            self._then()

        spec.loader.exec_module = load_then_call  # type: ignore[method-assign]
        return spec


def register_formulas() -> None:
    """Give FlopCounterMode the formulas: now if its module has been imported, else as soon as it is.

    That module imports triton, or warns where there is none, so ``import midl`` must not import it.
    """
    if _COUNTER not in sys.modules:
        sys.meta_path.insert(0, _AfterImport(_COUNTER, register_formulas))
        return
    register = sys.modules[_COUNTER].register_flop_formula
    ops = torch.ops.midl
    for op, formula in (
        (ops.linear, _linear),
        (ops.linear_backward, _linear_backward),
        (ops.conv2d, _conv2d),
        (ops.conv2d_backward, _conv2d_backward),
        (ops.ffn, _ffn),
        (ops.ffn_backward, _ffn_backward),
    ):
        register(op)(formula)
