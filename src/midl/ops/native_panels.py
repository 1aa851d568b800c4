"""Panels in place of parameters: what :mod:`midl.serving` keeps of a layer whose plain weights are freed."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from midl.config import MIDConfig
from midl.errors import KernelError
from midl.ops import native
from midl.ops.native_call import PreparedCall, Window, choices_of, ffn_fits, fits, keep_call
from midl.ops.native_conv2d import as_filters, as_matrix
from midl.ops.native_ffn import FFN_NAMES, PACKED_NAMES, pack_ffn
from midl.ops.native_packing import pack

__all__ = ["FFNPanels", "Panels", "ffn_runs_on_panels", "runs_on_panels"]

_COPIED = ("weight", "light_down", "light_up", "gate_weight")
_BASE = 256  # digits of this base are exact in bfloat16 too


def runs_on_panels(parameters: dict[str, Any], group_size: int) -> bool:
    """Return whether the kernels read nothing but panels of these parameters, at any number of rows.

    Groups must fill panels, the light gate's group means must be among them, as in float32, and filters must be
    multiplied in their own dtype.
    """
    if any(name not in parameters for name in _COPIED):
        return False
    weight = parameters["weight"]
    tensors = [parameters[name] for name in _COPIED if parameters[name] is not None]
    return (
        native.takes(weight, weight)
        and all(_has_no_gaps(t) and t.dtype == weight.dtype and t.device == weight.device for t in tensors)
        and (parameters["gate_weight"] is not None or weight.dtype == torch.float32)
        and (weight.dim() == 2 or native.multiplies_as_is(weight.dtype))
        and native.wants_weight_panels(
            weight.dtype, 1, weight.shape[1:].numel(), weight.shape[0] // group_size, 1, group_size
        )
    )


def _has_no_gaps(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def ffn_runs_on_panels(parameters: dict[str, Any], group_size: int) -> bool:
    """:func:`runs_on_panels` for an FFN."""
    if any(name not in parameters for name in FFN_NAMES):
        return False
    weight = parameters["weight"]
    tensors = [parameters[name] for name in PACKED_NAMES if parameters[name] is not None]
    return (
        native.takes(weight, weight)
        and all(t.is_contiguous() and t.dtype == weight.dtype and t.device == weight.device for t in tensors)
        and group_size >= native.extension().ffn_panel_group
    )


class _Kept(abc.ABC):
    """Panels of parameters for one instruction set, and how to get the parameters back.

    Args:
        parameters: a layer's, by name.
        names: of those that are copied and not None.
    """

    def __init__(self, parameters: dict[str, Any], names: Sequence[str]) -> None:
        tensors = {name: parameters[name].detach() for name in names if parameters[name] is not None}
        self.forms = {name: (t.shape, t.stride()) for name, t in tensors.items()}
        self.instruction_set = native.instruction_set()

    @abc.abstractmethod
    def _pack(self, matrices: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return panels of matrices by name, their padding zero."""

    @abc.abstractmethod
    def _panels(self) -> tuple[Tensor, ...]:
        """Return those that the layer keeps."""

    def _complete(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return matrices like the parameters with zeros for what panels hold beside them."""
        return numbers

    def unpack(self) -> dict[str, Tensor]:
        """Return the parameters by name, bit for bit, on fresh memory.

        Where an element lies in the panels is found by packing the elements' numbers, digit by digit, so that nothing
        here knows the layout.

        Raises:
            KernelError: the instruction set in use is no longer the panels'.
        """
        self._check_instruction_set()
        kept = self._panels()
        counts = [shape.numel() for shape, _ in self.forms.values()]
        numbers = torch.arange(1, sum(counts) + 1)  # 0 is left for padding
        found = [torch.zeros(panels.shape, dtype=torch.int64) for panels in kept]
        place = 1
        while place <= sum(counts):
            digits = (numbers // place % _BASE).to(kept[0].dtype).split(counts)
            matrices = {
                name: d.view(form[0][0], -1) for d, (name, form) in zip(digits, self.forms.items(), strict=True)
            }
            for number, panels in zip(found, self._pack(self._complete(matrices)), strict=True):
                number += panels.long() * place
            place *= _BASE
        flat = kept[0].new_empty(sum(counts))
        for panels, number in zip(kept, found, strict=True):
            flat[number[number > 0] - 1] = panels[number > 0]
        parts = zip(flat.split(counts), self.forms.items(), strict=True)
        return {name: _restore(rows, shape, stride) for rows, (name, (shape, stride)) in parts}

    def _check_instruction_set(self) -> None:
        if native.instruction_set() != self.instruction_set:
            raise KernelError(
                f"packed layer: the instruction set is {native.instruction_set()!r}, expected "
                f"{self.instruction_set!r} as when it was packed"
            )


class Panels(_Kept):
    """The panels of a linear layer or a convolution.

    Args:
        parameters: the layer's, by name; matrices, or filters of a convolution.
        group_size: neurons of a group.
    """

    def __init__(self, parameters: dict[str, Any], group_size: int) -> None:
        super().__init__(parameters, _COPIED)
        self.group_size = group_size
        self.light, self.weight = self._pack(
            {name: as_matrix(parameters[name].detach(), parameters[name].dtype) for name in self.forms}
        )
        self.calls: dict[Any, PreparedCall] = {}
        self.linear_call: PreparedCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": {}, "linear_call": None}

    def _pack(self, matrices: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        light, weight = pack(
            native.extension(), *matrices.values(), group_size=self.group_size, light=True, wide=True, kept=True,
            clean=True,
        )  # fmt: skip
        assert light is not None
        assert weight is not None
        return light, weight

    def _complete(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        if "gate_weight" in numbers:
            return numbers
        # In its place the light gate's means would be packed, which are nobody's elements.
        groups = len(numbers["weight"]) // self.group_size
        return {**numbers, "gate_weight": numbers["weight"].new_zeros(groups, len(numbers["light_down"]))}

    def _panels(self) -> tuple[Tensor, Tensor]:
        return self.light, self.weight

    def call_linear(self, x: Any, parameters: dict[str, Any], config: MIDConfig, relu: bool) -> Tensor | None:
        """Return a linear layer's output for x, or None where the call must be looked at.

        Args:
            x: whatever the layer got, when its selection is not observed and nothing compiles.
            parameters: the layer's own dict of them, all but the biases without values.
            config: the layer's.
            relu: whether an nn.ReLU is part of the layer.
        """
        call = self.linear_call
        if call is None or call.settings[0] is not config:
            choices = choices_of(parameters, config)
            if native.instruction_set() != self.instruction_set or choices.span != 1:
                return None
            if not fits(parameters, self.group_size, packed=True):
                return None
            prepared = native.prepare_linear(self, parameters, choices)
            if prepared is None:
                return None
            call = self.linear_call = PreparedCall((config,), prepared.run_plainly)
        return call.run(x, parameters, relu)

    def call_conv2d(
        self, x: Tensor, parameters: dict[str, Any], config: MIDConfig, window: Window, relu: bool
    ) -> Tensor | None:
        """Return a convolution's output for images, or None where :meth:`conv2d` must be called.

        Args:
            x: where :func:`midl.ops.native.infers_plainly` says so; the rest is as for :meth:`call_linear`.
            parameters: see there.
            config: see there.
            window: stride, padding and dilation.
            relu: see there.
        """
        key, settings = (x.shape, x.stride()), (config, window)
        call = self.calls.get(key)
        if call is None or call.settings != settings:
            weight = parameters["weight"]
            if native.instruction_set() != self.instruction_set or x.dtype != weight.dtype or x.numel() == 0:
                return None
            if x.dim() != 4 or x.shape[1] != weight.shape[1] or not fits(parameters, self.group_size, packed=True):
                return None
            prepared = native.prepare_conv2d(self, parameters, x, choices_of(parameters, config), window)
            if prepared is None:
                return None
            call = keep_call(self.calls, key, settings, prepared)
        return call.run(x, parameters, torch.get_num_threads(), relu=relu)

    def linear(self, x: Tensor, parameters: dict[str, Any], config: MIDConfig) -> tuple[Tensor, Tensor]:
        """Return ``(y, selected)`` of the linear op without noise for x (..., T, d), as ``midl.ops`` defines it.

        Raises:
            KernelError: the instruction set in use is no longer the panels'.
        """
        self._check_instruction_set()
        return native.linear_on_panels(x, self, parameters, choices_of(parameters, config))

    def conv2d(
        self, x: Tensor, parameters: dict[str, Any], config: MIDConfig, window: Window
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """:meth:`linear` for images (B, C, H, W), padding included."""
        self._check_instruction_set()
        return native.convolution_on_panels(x, self, parameters, window, choices_of(parameters, config))


class FFNPanels(_Kept):
    """The panels of an FFN.

    Args:
        parameters: the layer's, by name.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters, PACKED_NAMES)
        (self.weight,) = self._pack({name: parameters[name].detach() for name in self.forms})
        self.prepared: PreparedCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "prepared": None}

    def _pack(self, matrices: dict[str, Tensor]) -> tuple[Tensor]:
        tensors = {"value_weight": None, **matrices}
        return (pack_ffn(native.extension(), *(tensors[name] for name in PACKED_NAMES), clean=True),)  # type: ignore[arg-type]

    def _panels(self) -> tuple[Tensor]:
        return (self.weight,)

    def call(self, x: Tensor, parameters: dict[str, Any], config: MIDConfig, activation: str) -> Tensor | None:
        """Return the FFN's output for x, or None where :meth:`ffn` must be called.

        Args:
            x: where :func:`midl.ops.native.infers_plainly` says so.
            parameters: the layer's own dict of them, those that the panels copy without values.
            config: the layer's.
            activation: the layer's.
        """
        call = self.prepared
        if call is None or call.settings[0] is not config:
            fit = ffn_fits(parameters, config.group_size, packed=True)
            if not fit or native.instruction_set() != self.instruction_set:
                return None
            prepared = native.prepare_ffn(self, parameters, choices_of(parameters, config), activation)
            if prepared is None:
                return None
            call = self.prepared = PreparedCall((config,), prepared.run)
        return call.run(x, parameters, torch.get_num_threads())

    def ffn(
        self, x: Tensor, parameters: dict[str, Any], config: MIDConfig, activation: str
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return ``(y, selected)`` of the FFN op without noise for x (..., d), as ``midl.ops`` defines it.

        Raises:
            KernelError: the instruction set in use is no longer the panels'.
        """
        self._check_instruction_set()
        return native.ffn_on_panels(x, self, parameters, choices_of(parameters, config), activation)


def _restore(rows: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return elements in the order of :func:`as_matrix` as the parameter that they were."""
    t = torch.empty_strided(shape, stride, dtype=rows.dtype)
    values = as_filters(rows, t) if len(shape) == 4 else rows.view(shape)
    assert values is not None
    return t.copy_(values)
