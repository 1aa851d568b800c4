"""The ``native`` implementation: fused CPU kernels (native/), for float32 and bfloat16.

Weights that stay unchanged from call to call are packed once (:mod:`midl.ops.native_packing`).
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from midl.errors import KernelError
from midl.ops import huge_pages, native_ffn, reference, reference_ffn
from midl.ops.dispatch import Implementation, register
from midl.ops.native_backward import linear_backward
from midl.ops.native_conv2d import conv2d, conv2d_backward, conv2d_on_panels, image_geometry
from midl.ops.native_packing import Packed, State, cast_kept, packed_panels, tensor_states

if TYPE_CHECKING:
    from midl.ops.native_panels import FFNPanels, Panels

__all__ = [
    "Choices",
    "cast_parameter",
    "convolution",
    "convolution_on_panels",
    "extension",
    "infers_plainly",
    "instruction_set",
    "linear",
    "linear_on_panels",
    "multiplies_as_is",
    "prepare_conv2d",
    "prepare_linear",
    "supported_instruction_sets",
    "takes",
    "topk_groups",
    "use_instruction_set",
    "wants_weight_panels",
]

# Narrower groups leave the tiles of the backward kernels so empty that products of zeros are faster.
_BACKWARD_GROUP = {"linear": 3, "conv2d": 2}
# Up to these sizes dense kernels with tile registers multiply everything before ours have collected what was selected:
# neurons of a group; of convolutions, times channels of the input.
_TILES_GROUP, _TILES_WINDOW = 16, 4096
# Rows of a call from which packing inside the kernel costs next to nothing.
_ROWS_THAT_PACK_THEMSELVES = 2048


def _reason_against(module: ModuleType) -> str | None:
    """Return why the compiled module cannot be called: it misreads arguments if built from other sources; or None."""
    expected = hashlib.sha256(Path(__file__).parents[1].joinpath("_native.pyi").read_bytes()).hexdigest()
    built = getattr(module, "interface", "none")
    if built == expected:
        return None
    return (
        f"the extension {module.__name__} was built from other sources (interface {built:.8}, expected {expected:.8}); "
        "reinstall midl to build it again"
    )


try:
    # torch first: the kernels then share its OpenMP runtime.
    from midl import _native

    _missing = _reason_against(_native)
    if _missing:
        warnings.warn(_missing, RuntimeWarning, stacklevel=1)
except ImportError as error:
    _missing = f"the extension midl._native is not built ({error}); reinstall midl with a C++20 compiler"


def instruction_set() -> str:
    """Return the instruction set in use: the best that this CPU has, or what the variable ``MIDL_CPU`` says.

    >>> instruction_set() in supported_instruction_sets()
    True
    """
    return _native.instruction_set()


def supported_instruction_sets() -> list[str]:
    """Return the instruction sets of this build that this CPU runs, least capable first.

    ``avx512-emulated`` and ``amx-emulated`` are the code for AVX-512 and for tile registers compiled for AVX2: for
    tests, never chosen automatically.

    >>> "baseline" in supported_instruction_sets()
    True
    """
    return _native.supported_instruction_sets()


def use_instruction_set(name: str) -> None:
    """Use the kernels compiled for one instruction set, in the whole process.

    >>> before = instruction_set()
    >>> use_instruction_set("baseline")
    >>> use_instruction_set(before)

    Raises:
        KernelError: not one of :func:`supported_instruction_sets`.
    """
    try:
        _native.use_instruction_set(name)
    except ValueError as error:
        raise KernelError(f"use_instruction_set: name={error}") from None


if _missing is None and (forced := os.environ.get("MIDL_CPU")):
    if forced not in supported_instruction_sets():
        raise KernelError(
            f"MIDL_CPU={forced!r} is not an instruction set that this CPU runs, expected one of "
            f"{supported_instruction_sets()}"
        )
    use_instruction_set(forced)


def cast_parameter(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter in autocast's dtype, for inference; the copy is kept while the parameter does not change."""
    return parameter.to(dtype) if _missing else cast_kept(_native, parameter, dtype)


def topk_groups(scores: Tensor, k: int, threshold: float | None = None) -> Tensor:
    """:func:`midl.selection.topk_groups` for float32 scores on the CPU, by threshold search.

    >>> topk_groups(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
    tensor([[1, 3]], dtype=torch.int32)
    """
    scores = scores.contiguous()
    selected = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)
    groups = scores.shape[-1]
    _native.topk(
        scores.data_ptr(), scores.numel() // groups, groups, k, _least(threshold), selected.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return selected


def _least(threshold: float | None) -> float:
    """Return the threshold as the kernels take it: every score reaches -inf."""
    return -math.inf if threshold is None else threshold


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """Return a tensor whose rows have unit stride, and the stride between them."""
    if t.dim() == 2 and t.stride(1) == 1:
        return t, t.stride(0)
    return t.contiguous(), t.shape[-1]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, k: int, group_size: int, span: int, interpolation: str, ste: str,
    threshold: float | None = None, full: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the linear op; see :mod:`midl.ops` for the arguments.

    ``full`` is the full path of every neuron, (..., n) and contiguous, where the caller has computed it.
    """
    x, stride = _rows(x)
    n, depth = weight.shape
    *batch, positions, _ = x.shape
    y = huge_pages.empty_where_mapped((*batch, positions, n), x.dtype)
    blocks = positions if span == 1 else -(-positions // span)
    selected = x.new_empty((*batch, blocks, k), dtype=torch.int32)
    # Kept alive by name until the call returns: where a copy had to be made, only its address goes to the kernel.
    weight, light_down, light_up = weight.contiguous(), light_down.contiguous(), light_up.contiguous()
    bias, gate_weight, gate_bias = _dense(bias), _dense(gate_weight), _dense(gate_bias)
    if noise is not None:
        noise = noise.to(torch.float32).contiguous()
    rows = y.numel() // n
    keeps = rows < _ROWS_THAT_PACK_THEMSELVES
    light, wide = packed_panels(
        _native, weight, light_down, light_up, gate_weight, group_size, light=keeps,
        wide=keeps and full is None and wants_weight_panels(x.dtype, rows, depth, n // group_size, k, group_size),
    )  # fmt: skip
    _native.linear_forward(
        x.dtype == torch.bfloat16, x.data_ptr(), stride, rows, depth, n, light_down.shape[0],
        n // group_size, k, _least(threshold), positions, span, weight.data_ptr(), _address(bias),
        light_down.data_ptr(), light_up.data_ptr(), _address(gate_weight), _address(gate_bias), _address(noise),
        _address(light), _address(wide), _address(full), interpolation == "hard",
        y.data_ptr(), selected.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


class Choices(NamedTuple):
    """What an op is told beside tensors, for inference: see :mod:`midl.ops`."""

    k: int
    group_size: int
    span: int
    interpolation: str
    threshold: float | None


def linear_on_panels(
    x: Tensor, panels: Panels, parameters: dict[str, Any], choices: Choices
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`linear` without noise from panels alone, where all ``parameters`` but the biases are mere shapes."""
    x, stride = _rows(x)
    n, depth = parameters["weight"].shape
    *batch, positions, _ = x.shape
    k, group_size, span, interpolation, threshold = choices
    y = huge_pages.empty_where_mapped((*batch, positions, n), x.dtype)
    selected = x.new_empty((*batch, -(-positions // span), k), dtype=torch.int32)
    bias, gate_bias = _dense(parameters["bias"]), _dense(parameters["gate_bias"])
    light, weight = panels.light.data_ptr(), panels.weight.data_ptr()
    _native.linear_forward(
        x.dtype == torch.bfloat16, x.data_ptr(), stride, y.numel() // n, depth, n, parameters["light_down"].shape[0],
        n // group_size, k, _least(threshold), positions, span, weight, _address(bias),
        # Never read: the panels take their place.
        light, light, light if parameters["gate_weight"] is not None else 0,
        _address(gate_bias), 0, light, weight, 0, interpolation == "hard",
        y.data_ptr(), selected.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, selected


def multiplies_as_is(dtype: torch.dtype) -> bool:
    """Return whether the instruction set's kernels for convolutions take parameters of ``dtype`` without a cast."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _native.dot_pairs())


def wants_weight_panels(
    dtype: torch.dtype, rows: int, depth: int, groups: int, k: int, group_size: int, *, convolution: bool = False
) -> bool:
    """Return whether a forward call of these sizes with weights of ``dtype`` reads the weight's panels."""
    return _native.wants_weight_panels(dtype == torch.bfloat16, rows, depth, groups, k, group_size, convolution)


def infers_plainly(x: Any) -> bool:
    """Return what :func:`midl.ops.dispatch.is_plain_inference` does for x, in a quarter of its time.

    Not asked is whether a compiler is at work; it cannot look in here. With autocast on the CPU the answer is no.
    """
    return _native.infers_plainly(x)


def prepare_linear(
    packed: Packed | Panels, parameters: dict[str, Any], choices: Choices, *, wide: bool = True, dense: bool = False
) -> _native.PreparedLinear | None:
    """Return an object whose ``run(x, parameters, threads, selection=False, relu=False)`` is a layer's inference call.

    None where the panels are not those of the parameters as they are. ``run`` returns y, with ``selection`` also what
    is selected; None for inputs it cannot take and when the parameters are no longer what they were
    (native/prepared.cpp).

    Args:
        packed: the panels, of the parameters or in their place: then all but the biases are mere shapes.
        parameters: of the layer, by name.
        choices: with ``span=1``.
        wide: use the weight's panels.
        dense: compute every neuron by torch.
    """
    plain, states = _plain(packed, parameters, choices.group_size)
    if states is None or not all(p is None or p.is_contiguous() for p in plain.values()):
        return None
    weight, rank = parameters["weight"], parameters["light_down"].shape[0]
    n, depth = weight.shape
    assert packed.light is not None
    return _native.PreparedLinear(
        plain, states, weight.dtype == torch.bfloat16, depth, n, rank, n // choices.group_size,
        choices.k, _least(choices.threshold), choices.interpolation == "hard", packed.light,
        packed.weight if wide else None, F.linear if dense else None,
    )  # fmt: skip


def prepare_conv2d(
    packed: Packed | Panels, parameters: dict[str, Any], x: Tensor, choices: Choices, window: tuple[Any, Any, Any],
    *, dense: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> _native.PreparedConvolution | None:  # fmt: skip
    """:func:`prepare_linear` for a convolution of images like x, by panels or densely.

    Half precision only where the kernels multiply it as it is.

    Args:
        packed: the panels, those of the weight among them unless it is dense; of the parameters or in their place.
        parameters: of the layer, by name.
        x: an input; those of another size or memory format want another call.
        choices: ``span=0`` for one selection per image.
        window: stride, padding and dilation, pairs of ints.
        dense: computes every neuron, channels-last, from x and weight; None for the selected ones by the kernels.
    """
    plain, states = _plain(packed, parameters, choices.group_size)
    vectors = [plain[name] for name in ("bias", "light_up", "gate_weight", "gate_bias") if name in plain]
    if states is None or not all(p is None or p.is_contiguous() for p in vectors):
        return None
    weight = parameters["weight"]
    images, height, width = image_geometry(x, weight, *map(list, window))
    if height < 1 or width < 1:
        return None
    k, span = choices.k, choices.span
    positions = width if span else height * width
    selected = (x.shape[0], height, -(-width // span), k) if span else (x.shape[0], 1, k)
    n, (rank, *_) = weight.shape[0], parameters["light_down"].shape
    assert packed.light is not None
    return _native.PreparedConvolution(
        plain, states, x, x.dtype == torch.bfloat16, (x.shape[0], height, width, n), selected, images,
        x.shape[0] * height * width, n, rank, n // choices.group_size, k, _least(choices.threshold), positions,
        span or positions, choices.interpolation == "hard", packed.light, packed.weight if dense is None else None,
        dense,
    )  # fmt: skip


def prepare_ffn(
    packed: Packed | FFNPanels, parameters: dict[str, Any], choices: Choices, activation: str
) -> _native.PreparedFfn | None:  # fmt: skip
    """:func:`prepare_linear` for an FFN whose panels ``packed.weight`` are.

    Args:
        packed: the panels, of the parameters or in their place.
        parameters: of the layer, by name, all of them; those that panels replace are mere shapes.
        choices: the op's.
        activation: between its two layers.
    """
    plain, states = _plain(packed, parameters, choices.group_size, native_ffn.PACKED_NAMES)
    if states is None or packed.weight is None:
        return None
    tensors = [p for p in plain.values() if p is not None]
    dtype = packed.weight.dtype
    if not all(p.is_contiguous() and p.dtype == dtype and p.device.type == "cpu" for p in tensors):
        return None
    (hidden, depth), (groups, rank) = parameters["weight"].shape, parameters["gate_weight"].shape
    return _native.PreparedFfn(
        plain, states, dtype == torch.bfloat16, depth, hidden, len(parameters["down_weight"]), rank, groups, choices.k,
        _least(choices.threshold), choices.interpolation == "hard", reference_ffn.ACTIVATIONS.index(activation),
        packed.weight,
    )  # fmt: skip


_PACKED_NAMES = ("weight", "light_down", "light_up", "gate_weight")


def _plain(
    packed: Packed | Panels | FFNPanels, parameters: dict[str, Any], group_size: int,
    names: Sequence[str] = _PACKED_NAMES,
) -> tuple[dict[str, Any], dict[str, State] | None]:  # fmt: skip
    """Return the parameters that a prepared call looks at, and the states of those that the panels were made of."""
    if isinstance(packed, Packed):
        return parameters, _states_of(packed, parameters, group_size, names)
    return {name: p for name, p in parameters.items() if p is None or not p.is_meta}, {}


def _states_of(
    packed: Packed, parameters: dict[str, Any], group_size: int, names: Sequence[str]
) -> dict[str, State] | None:
    """Return the states of the parameters that the panels were made of, or None where they have changed since."""
    names = [name for name in names if parameters[name] is not None]
    tensors = tuple(parameters[name] for name in names)
    form = _native.instruction_set(), group_size
    if not packed.matches(form, tensor_states(_native, tensors), tensors):
        return None
    return dict(zip(names, packed.states, strict=True))


def _linear_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, group_size: int, span: int,
    interpolation: str, ste: str, needs: list[bool], padded: bool = False,
) -> reference.Grads:  # fmt: skip
    if ste == "dense" or x.numel() == 0:  # every neuron's value is wanted
        return reference.linear_backward(
            grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, group_size, span,
            interpolation, ste, needs,
        )  # fmt: skip
    return linear_backward(
        _native, grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, group_size, span,
        interpolation, needs, padded,
        _backward_densely("linear", x, weight, group_size) and not _backward_picks(x, weight, selected, group_size),
    )  # fmt: skip


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor, light_up: Tensor, gate_weight: Tensor | None,
    gate_bias: Tensor | None, noise: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    k: int, group_size: int, span: int, interpolation: str, ste: str, threshold: float | None = None,
    full: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(y, selected)`` of the convolution op; see :mod:`midl.ops` for the arguments.

    ``full`` is the full path of every neuron, (B, n, H, W) and channels-last, where the caller has computed it.
    """
    return conv2d(
        _native, x, weight, bias, light_down, light_up, gate_weight, gate_bias, noise, stride, padding, dilation, k,
        group_size, span, interpolation, _least(threshold), full,
    )  # fmt: skip


def convolution_on_panels(
    x: Tensor, panels: Panels, parameters: dict[str, Any], window: tuple[Any, Any, Any], choices: Choices
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`convolution` without noise from panels alone, as :func:`linear_on_panels`."""
    k, group_size, span, interpolation, threshold = choices
    stride, padding, dilation = map(list, window)
    return conv2d_on_panels(
        _native, x, panels.light, panels.weight, parameters, stride, padding, dilation, k, group_size, span,
        interpolation, _least(threshold),
    )  # fmt: skip


def _conv2d_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, light_down: Tensor,
    light_up: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], group_size: int, span: int, interpolation: str, ste: str, needs: list[bool],
    padded: bool = False,
) -> reference.Grads:  # fmt: skip
    if ste == "dense" or x.numel() == 0:
        return reference.conv2d_backward(
            grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, stride, padding, dilation,
            group_size, span, interpolation, ste, needs,
        )  # fmt: skip
    return conv2d_backward(
        _native, grad_y, selected, x, weight, bias, light_down, light_up, gate_weight, gate_bias, stride, padding,
        dilation, group_size, span, interpolation, needs, padded,
        _backward_densely("conv2d", x, weight, group_size),
    )  # fmt: skip


def _backward_picks(x: Tensor, weight: Tensor, selected: Tensor, group_size: int) -> bool:
    """Return whether a linear layer's kernel for narrow groups multiplies the selected neurons of many rows alone."""
    n, d = weight.shape
    as_is = x.dtype == torch.bfloat16 and _native.dot_pairs()
    return _native.backward_picks(as_is, x.numel() // d, n // group_size, selected.shape[-1], group_size)


def _backward_densely(op: str, x: Tensor, weight: Tensor, group_size: int) -> bool:
    """Return whether the gradients come faster from products of all neurons than from those of the selected ones."""
    if group_size < _BACKWARD_GROUP[op]:
        return True
    if x.dtype != torch.bfloat16 or not instruction_set().startswith("amx"):
        return False
    return group_size <= _TILES_GROUP if op == "linear" else weight.shape[1] * group_size <= _TILES_WINDOW


def ffn(
    x: Tensor, weight: Tensor, bias: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None,
    down_weight: Tensor, down_bias: Tensor | None, light_down: Tensor, light_up: Tensor, light_hidden: Tensor,
    light_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, noise: Tensor | None, k: int, group_size: int,
    activation: str, interpolation: str, ste: str, threshold: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return native_ffn.ffn(
        _native, x, weight, bias, value_weight, value_bias, down_weight, down_bias, light_down, light_up,
        light_hidden, light_bias, gate_weight, gate_bias, noise, k, activation, interpolation, threshold,
    )  # fmt: skip


def _ffn_backward(
    grad_y: Tensor, selected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, value_weight: Tensor | None,
    value_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, light_down: Tensor, light_up: Tensor,
    light_hidden: Tensor, light_bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, group_size: int, activation: str,
    interpolation: str, ste: str, needs: list[bool], padded: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    if ste == "dense" or x.numel() == 0 or group_size < _native.ffn_panel_group:
        return reference_ffn.ffn_backward(
            grad_y, selected, x, weight, bias, value_weight, value_bias, down_weight, down_bias, light_down, light_up,
            light_hidden, light_bias, gate_weight, gate_bias, group_size, activation, interpolation, ste, needs, padded,
        )  # fmt: skip
    return native_ffn.ffn_backward(
        _native, grad_y, selected, x, weight, bias, value_weight, value_bias, down_weight, light_down, light_up,
        light_hidden, gate_weight, gate_bias, activation, interpolation, needs, padded,
    )  # fmt: skip


def ffn_on_panels(
    x: Tensor, panels: FFNPanels, parameters: dict[str, Any], choices: Choices, activation: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`ffn` without noise from panels alone, where those of ``parameters`` that they copy are mere shapes."""
    return native_ffn.ffn_on_panels(
        _native, x, panels.weight, parameters, choices.k, activation, choices.interpolation, choices.threshold
    )


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def extension() -> ModuleType:
    """Return the module of the compiled kernels."""
    return _native


def takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels are there and compute in the dtype and on the device of these tensors."""
    return _missing is None and _unsupported("linear", x, weight=weight) is None


def _unavailable() -> str | None:
    return _missing


def _unsupported(op: str, x: Tensor, *, weight: Tensor, **_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, expected the CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x has dtype {x.dtype}, expected float32 or bfloat16"
    if weight.dtype != x.dtype:
        return f"weight has dtype {weight.dtype}, expected {x.dtype} like x"
    return None


def _prefers(
    op: str, x: Tensor, *, weight: Tensor, k: int, group_size: int, span: int = 1, threshold: float | None = None,
    positions: tuple[int, int] = (1, 1), **_: Any,
) -> bool:  # fmt: skip
    from midl.ops.cpu_calibration import constants
    from midl.ops.cpu_cost import sparse_wins

    if op not in ("linear", "conv2d"):
        return True
    n, depth = weight.shape[0], weight.numel() // weight.shape[0]
    rows = x.numel() // depth if op == "linear" else x.shape[0] * math.prod(positions)
    if threshold is not None:
        k = -(-k // 2)  # k is the most; calibrate_threshold makes it twice the average unless told otherwise
    dtype = "float32" if x.dtype == torch.float32 else "bfloat16"
    return sparse_wins(constants(), op, dtype, rows, depth, n, k, group_size, span or math.prod(positions))


register(
    Implementation(
        "native",
        {
            "linear": linear,
            "linear_backward": _linear_backward,
            "conv2d": convolution,
            "conv2d_backward": _conv2d_backward,
            "ffn": ffn,
            "ffn_backward": _ffn_backward,
        },
        unavailable=_unavailable,
        unsupported=_unsupported,
        prefer=_prefers,
    )
)
