"""Weights laid out as panels for the native kernels, kept while the parameters stay as they are.

A panel copy costs as much memory as the parameters it copies, so it is made only on the second call with the same,
unchanged parameters: training, where every step changes them, packs slice by slice inside the kernel instead and keeps
nothing. A copy dies with its weight and is replaced as soon as the parameters change: torch's version counters see
in-place operations, addresses see swapped storage, and a sample of the values sees edits through ``.data``, which move
no counter (one of a few elements, or of a tenth of the rows here and there, can slip through; ``clear_packed`` is for
that).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midl.ops import huge_pages

__all__ = [
    "Packed", "cast_kept", "clear_packed", "pack", "packed_bytes", "packed_for", "packed_once", "packed_panels",
    "tensor_states",
]  # fmt: skip

State = tuple[int, int, int]  # of a tensor: version, address, sample of its values


class Packed:
    """The parameters of a layer as they were at the last call, weakly referenced, and the panels made of them so far.

    ``calls`` is for :mod:`midl.ops.native_call`: what is prepared for this state dies with it.
    """

    __slots__ = ("calls", "form", "light", "references", "states", "weight")

    def __init__(self, form: tuple[str, int], states: list[State], references: list[weakref.ref[Tensor]]) -> None:
        self.form, self.states, self.references = form, states, references
        self.light: Tensor | None = None
        self.weight: Tensor | None = None
        self.calls: dict[Any, Any] = {}

    def matches(self, form: tuple[str, int], states: list[State], tensors: tuple[Tensor, ...]) -> bool:
        """Return whether these very tensors, unchanged, were there at the last call; an id alone may be reused.

        ``form`` is what else the panels depend on: instruction set and group size.
        """
        return (
            self.states == states
            and self.form == form
            and all(r() is t for r, t in zip(self.references, tensors, strict=True))
        )


_entries: dict[int, Packed] = {}


class _Cast(NamedTuple):
    source: weakref.ref[Tensor]
    state: State
    copy: Tensor


_casts: dict[int, _Cast] = {}


def clear_packed() -> None:
    """Free all panels and casts; the next calls make them again.

    >>> clear_packed()
    >>> packed_bytes()
    0
    """
    _entries.clear()
    _casts.clear()


def packed_bytes() -> int:
    """Return how much memory panels and casts hold at present, in bytes."""
    panels = [t for e in list(_entries.values()) for t in (e.light, e.weight)] + [c.copy for c in list(_casts.values())]
    return sum(t.nbytes for t in panels if t is not None)


def cast_kept(kernels: Any, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` in another dtype, the same copy from call to call while the tensor stays as it is.

    Inference under autocast would otherwise read every weight of a layer in float32 to cast it, selected or not.
    """
    if tensor.dtype == dtype or tensor.is_inference() or not tensor.is_contiguous():
        return tensor.to(dtype)
    key, (state,) = id(tensor), tensor_states(kernels, (tensor,))
    cast = _casts.get(key)
    if cast is None or cast.source() is not tensor or cast.state != state or cast.copy.dtype != dtype:
        with torch.inference_mode(False):  # the copy wants a version counter, or it would never be packed
            copy = tensor.detach().to(dtype)
        cast = _casts[key] = _Cast(weakref.ref(tensor, lambda _: _casts.pop(key, None)), state, copy)
    return cast.copy


def packed_for(weight: Tensor | None) -> Packed | None:
    """Return what is kept for ``weight``, perhaps of an earlier state."""
    return _entries.get(id(weight))


def tensor_states(kernels: Any, tensors: tuple[Tensor, ...]) -> list[State]:
    """Return the states of tensors without gaps in memory that have version counters."""
    return [(t._version, t.data_ptr(), kernels.sample(t.data_ptr(), t.nbytes)) for t in tensors]


def packed_panels(
    kernels: Any, weight: Tensor, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None, group_size: int,
    *, light: bool, wide: bool, matrix: Callable[[Tensor], Tensor] = lambda t: t,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return the panels kept of light path and gate, and of the weight; None where there are none (yet).

    Args:
        kernels: the extension.
        weight, light_down, light_up, gate_weight: the parameters, without gaps in memory.
        group_size: neurons of a group.
        light: make the panels of light path and gate if they are missing and the parameters have not changed.
        wide: the same for those of the weight.
        matrix: brings a parameter into the form that is packed, (rows, depth), contiguous.
    """
    if gate_weight is None:
        tensors: tuple[Tensor, ...] = (weight, light_down, light_up)
    else:
        tensors = (weight, light_down, light_up, gate_weight)
    entry = _unchanged(kernels, tensors, group_size)
    if entry is None:
        return None, None
    light, wide = light and entry.light is None, wide and entry.weight is None
    if light or wide:
        new_light, new_weight = pack(
            kernels, *map(matrix, tensors), group_size=group_size, light=light, wide=wide, kept=True
        )
        # Only now: another thread may be using the entry.
        entry.light = entry.light if new_light is None else new_light
        entry.weight = entry.weight if new_weight is None else new_weight
    return entry.light, entry.weight


def packed_once(
    kernels: Any, tensors: tuple[Tensor, ...], group_size: int, make: Callable[[], Tensor]
) -> Tensor | None:  # fmt: skip
    """Return what ``make`` makes of ``tensors``, kept while they stay as they are; None at the first call with them.

    Args:
        kernels: the extension.
        tensors: without gaps in memory; the first is the weight with which the copy dies.
        group_size: neurons of a group.
        make: called at the second call.
    """
    entry = _unchanged(kernels, tensors, group_size)
    if entry is None:
        return None
    if entry.weight is None:
        entry.weight = make()
    return entry.weight


def _unchanged(kernels: Any, tensors: tuple[Tensor, ...], group_size: int) -> Packed | None:
    """Return what is kept for the first of ``tensors`` if all are as at the last call; else None, and note them."""
    if any(t.is_inference() for t in tensors):
        return None  # no version counter: a change could not be seen
    form, states = (kernels.instruction_set(), group_size), tensor_states(kernels, tensors)
    key = id(tensors[0])
    entry = _entries.get(key)
    if entry is not None and entry.matches(form, states, tensors):
        return entry
    references = [weakref.ref(tensors[0], lambda _: _entries.pop(key, None)), *map(weakref.ref, tensors[1:])]
    _entries[key] = Packed(form, states, references)
    return None


def pack(
    kernels: Any, weight: Tensor, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None = None, *,
    group_size: int, light: bool, wide: bool, kept: bool = False, clean: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return new panels of light path and gate, and of the weight, as asked for; all matrices are contiguous.

    With ``kept`` they are for many calls and lie in huge pages. Their padding is zero with ``clean``, else whatever was
    there.
    """
    n, depth = weight.shape
    sizes = (depth, n, light_down.shape[0], n // group_size)
    bfloat16 = weight.dtype == torch.bfloat16
    light_size, weight_size = kernels.packed_sizes(bfloat16, *sizes)

    def allocate(count: int) -> Tensor:
        panels = huge_pages.empty(count, weight.dtype) if kept else weight.new_empty(count)
        return panels.zero_() if clean else panels

    light_panels = allocate(light_size) if light else None
    weight_panels = allocate(weight_size) if wide else None
    kernels.pack(
        bfloat16, *sizes, weight.data_ptr(), light_down.data_ptr(), light_up.data_ptr(),
        0 if gate_weight is None else gate_weight.data_ptr(), 0 if light_panels is None else light_panels.data_ptr(),
        0 if weight_panels is None else weight_panels.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return light_panels, weight_panels
