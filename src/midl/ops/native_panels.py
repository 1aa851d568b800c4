"""Panels in place of parameters: what :mod:`midl.serving` keeps of a linear layer whose plain weights are freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midl.errors import KernelError
from midl.ops import native
from midl.ops.native_packing import pack

__all__ = ["Panels", "runs_on_panels"]

_COPIED = ("weight", "light_down", "light_up", "gate_weight")
_BASE = 256  # digits of this base are exact in bfloat16 too


def runs_on_panels(parameters: dict[str, Any], group_size: int) -> bool:
    """Return whether the kernels read nothing but panels of these parameters, at any number of rows.

    Groups must fill panels, and the light gate's group means must be among them, as in float32.
    """
    if any(name not in parameters for name in _COPIED):
        return False
    weight = parameters["weight"]
    tensors = [parameters[name] for name in _COPIED if parameters[name] is not None]
    return (
        native.takes(weight, weight)
        and all(t.is_contiguous() and t.dtype == weight.dtype and t.device == weight.device for t in tensors)
        and (parameters["gate_weight"] is not None or weight.dtype == torch.float32)
        and native.wants_weight_panels(weight.dtype, 1, weight.shape[0] // group_size, 1, group_size)
    )


class Panels:
    """The panels of one layer for one instruction set, and how to get the parameters back.

    Args:
        parameters: the layer's, by name.
        group_size: neurons of a group.
    """

    def __init__(self, parameters: dict[str, Any], group_size: int) -> None:
        tensors = {name: parameters[name].detach() for name in _COPIED if parameters[name] is not None}
        self.shapes = {name: t.shape for name, t in tensors.items()}
        self.group_size, self.instruction_set = group_size, native.instruction_set()
        self.light, self.weight = self._pack(*tensors.values())

    def _pack(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        light, weight = pack(
            native.extension(), *tensors, group_size=self.group_size, light=True, wide=True, kept=True, clean=True
        )
        assert light is not None
        assert weight is not None
        return light, weight

    def linear(
        self, x: Tensor, bias: Tensor | None, gate_bias: Tensor | None, k: int, span: int, interpolation: str,
        threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return ``(y, selected)`` of the linear op without noise for x (..., T, d), as ``midl.ops`` defines it.

        Raises:
            KernelError: the instruction set in use is no longer the panels'.
        """
        self._check_instruction_set()
        return native.linear_on_panels(
            x, self.light, self.weight, self.shapes, bias, gate_bias, k, self.group_size, span, interpolation, threshold
        )

    def unpack(self) -> dict[str, Tensor]:
        """Return the parameters by name, bit for bit, on fresh memory.

        Where an element lies in the panels is found by packing the elements' numbers, digit by digit, so that nothing
        here knows the layout.

        Raises:
            KernelError: the instruction set in use is no longer the panels'.
        """
        self._check_instruction_set()
        counts = [shape.numel() for shape in self.shapes.values()]
        numbers = torch.arange(1, sum(counts) + 1)  # 0 is left for padding
        light = torch.zeros(self.light.shape, dtype=torch.int64)
        weight = torch.zeros(self.weight.shape, dtype=torch.int64)
        place = 1
        while place <= sum(counts):
            digits = (numbers // place % _BASE).to(self.light.dtype).split(counts)
            matrices = [d.view(shape) for d, shape in zip(digits, self.shapes.values(), strict=True)]
            if "gate_weight" not in self.shapes:
                # In its place the light gate's means would be packed, which are nobody's elements.
                groups = self.shapes["weight"][0] // self.group_size
                matrices.append(matrices[0].new_zeros(groups, self.shapes["light_down"][0]))
            light_digits, weight_digits = self._pack(*matrices)
            light += light_digits.long() * place
            weight += weight_digits.long() * place
            place *= _BASE
        flat = self.light.new_empty(sum(counts))
        for panels, number in ((self.light, light), (self.weight, weight)):
            flat[number[number > 0] - 1] = panels[number > 0]
        parts = flat.split(counts)
        return {name: t.view(shape).clone() for t, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def _check_instruction_set(self) -> None:
        if native.instruction_set() != self.instruction_set:
            raise KernelError(
                f"packed layer: the instruction set is {native.instruction_set()!r}, expected "
                f"{self.instruction_set!r} as when it was packed"
            )
