"""Which implementation of midl's ops runs: the registry, the switch ``kernels`` and the choice ``auto``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from midl.errors import KernelError, MIDLError

__all__ = [
    "NAMES",
    "Implementation",
    "add_ops",
    "invoke",
    "is_plain",
    "is_plain_inference",
    "kernels",
    "register",
    "resolve",
    "selected_kernels",
    "unavailable_reason",
]

NAMES = ("reference", "native", "triton", "dense")


class Implementation:
    """One implementation of midl's ops: functions named and called like those of :mod:`midl.ops.reference`.

    Args:
        name: one of ``NAMES``.
        ops: op name to function; an op that is missing is not supported.
        unavailable: returns why this implementation cannot run on this machine, or None.
        unsupported: returns why it cannot run this op on this input, or None. Gets the op's name, x and keywords.
        prefer: returns whether ``auto`` should choose it for this supported call. Same arguments.
    """

    def __init__(
        self,
        name: str,
        ops: dict[str, Callable[..., Any]],
        unavailable: Callable[[], str | None] = lambda: None,
        unsupported: Callable[..., str | None] = lambda op, x, **_: None,
        prefer: Callable[..., bool] = lambda op, x, **_: True,
    ) -> None:
        self.name, self.ops = name, ops
        self.unavailable, self.unsupported, self.prefer = unavailable, unsupported, prefer

    def reason_against(self, op: str, x: Tensor, **call: Any) -> str | None:
        """Return why this implementation cannot take the call, or None."""
        if reason := self.unavailable():
            return reason
        if op not in self.ops:
            return f"it does not implement midl::{op}"
        return self.unsupported(op, x, **call)


_registry: dict[str, Implementation] = {}
# Process-wide, not per thread: autograd runs backward passes in threads of its own.
_choice = "auto"


def register(implementation: Implementation) -> None:
    """Add an implementation; its name must be one of ``NAMES``."""
    _registry[implementation.name] = implementation


def add_ops(name: str, ops: dict[str, Callable[..., Any]]) -> None:
    """Let the implementation ``name`` compute further ops, which live in modules of their own."""
    _implementation(name).ops.update(ops)


def _implementation(name: str) -> Implementation:
    if name not in _registry:
        importlib.import_module(f"midl.ops.{name}")
        if name not in _registry:
            raise KernelError(f"midl.ops.{name} was imported but registered no implementation named {name!r}")
    return _registry[name]


def unavailable_reason(name: str) -> str | None:
    """Return why the implementation ``name`` cannot run on this machine, or None if it can."""
    try:
        return _implementation(name).unavailable()
    except ImportError:
        return "not part of this version of midl"


def selected_kernels() -> str:
    """Return the name that :func:`kernels` last set."""
    return _choice


class kernels:  # noqa: N801 - a verb that users call; also a context manager
    """Choose the implementation of midl's ops, for the process or for a ``with`` block.

    >>> import midl
    >>> with midl.kernels("reference"):
    ...     y = midl.MIDLinear(8, 16, rank=2)(torch.ones(3, 8))
    >>> _ = midl.kernels("auto")

    A backward pass takes the choice at the time it runs: gradients depend on the inputs and the selection alone, not on
    who computed the output.

    Args:
        name: ``"auto"`` (the fastest that can take the call), ``"reference"`` (the specification, plain torch),
            ``"native"`` (CPU kernels), ``"triton"`` (GPU kernels) or ``"dense"`` (every neuron computed, then masked).

    Raises:
        MIDLError: unknown name.
        KernelError: the implementation is not available here; the message says which are.
    """

    def __init__(self, name: str) -> None:
        global _choice
        if name != "auto" and name not in NAMES:
            raise MIDLError(f"kernels: name={name!r}, expected one of {('auto', *NAMES)}")
        if name != "auto" and (reason := unavailable_reason(name)):
            available = [other for other in NAMES if unavailable_reason(other) is None]
            raise KernelError(f"kernels: name={name!r} is not available: {reason}; available here: {available}")
        self._name, self._entered, self._restore = name, False, [_choice]
        _choice = name

    def __enter__(self) -> kernels:
        global _choice
        if self._entered:
            self._restore.append(_choice)
        # Else the first `with` ends what the call began.
        self._entered, _choice = True, self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _choice
        _choice = self._restore.pop()


def resolve(op: str, x: Tensor, **call: Any) -> Callable[..., Any]:
    """Return the function that computes ``op`` for input ``x`` under the current choice."""
    if _choice != "auto":
        implementation = _implementation(_choice)
        if reason := implementation.reason_against(op, x, **call):
            raise KernelError(f"midl::{op}: kernels={_choice!r} cannot take this call: {reason}")
        return implementation.ops[op]
    for name in _AUTO_ORDER[x.device.type if x.device.type in _AUTO_ORDER else "other"]:
        if unavailable_reason(name) is None:
            implementation = _implementation(name)
            if implementation.reason_against(op, x, **call) is None and implementation.prefer(op, x, **call):
                return implementation.ops[op]
    raise KernelError(f"midl::{op}: no implementation takes dtype={x.dtype} on device={x.device}")


_PLAIN = (Parameter, Tensor)


def is_plain_inference(x: Tensor, weight: Tensor | None) -> bool:
    """Return whether the call is plain, as :func:`is_plain` says, and autograd is off."""
    return not torch.is_grad_enabled() and is_plain(x, weight)


def is_plain(x: Tensor, weight: Tensor | None) -> bool:
    """Return whether nobody but autograd, between the caller and the implementation, wants to see the op.

    That is: no compilation or tracing, no dispatch mode (FLOP counters, fake tensors), no transform, no profiler, no
    tensor subclass, no lazy negation or zeros, no meta device, no sparse or nested tensor. torch's dispatcher then only
    costs time, more than a small layer takes to compute.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and type(weight) in _PLAIN
        and (x.is_cpu or x.is_cuda)
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()
        and not x._is_zerotensor()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._functorch.is_legacy_batchedtensor(x)  # of torch.autograd.grad(is_grads_batched=True)
        and not torch.autograd.profiler._is_profiler_enabled
        and torch._C._get_tracing_state() is None
    )


def invoke(run: Callable[..., Any], *args: Any) -> Any:
    """Return ``run(*args)`` with autocast off: it would round what an implementation computes in float32."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return run(*args)
    with torch.autocast(device, enabled=False):
        return run(*args)


_AUTO_ORDER = {
    "cpu": ("native", "dense", "reference"),
    "cuda": ("triton", "dense", "reference"),
    "other": ("dense", "reference"),
}
