"""What the lab measures of a trained model: accuracy, activity, FLOPs, latency, bytes kept for the backward pass."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from midl.analysis import LayerActivity, count_flops, record_activity
from midl.errors import MIDLError
from midl.lab.bench.dense import compile_frozen, free_compiled
from midl.lab.data import Dataset, Split
from midl.lab.pairs import Call, time_in_pairs
from midl.layers import MIDLayer
from midl.ops.dispatch import unavailable_reason
from midl.serving import fuse_relu_, pack_

__all__ = ["layer_flops", "measure_accuracy", "measure_latency", "measure_step", "peak_bytes", "saved_bytes"]

_BATCH = 500
_ROUNDS_TO_CHOOSE = 21
_SECONDS_TO_CHOOSE = 5
_SECONDS = 120


@torch.no_grad()
def measure_accuracy(model: nn.Module, dataset: Dataset, split: Split | None = None) -> tuple[float, dict[str, float]]:
    """Return the accuracy on the test rows, in percent, and the measured fraction of active neurons per MID-L layer.

    With ``split`` other rows of the data set are scored.

    Both come from the same forward passes, in evaluation mode; the model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    sparse = any(isinstance(module, MIDLayer) for module in model.modules())
    split = dataset.test if split is None else split
    correct, rows = 0, len(split)
    recording: AbstractContextManager[Mapping[str, LayerActivity]]
    recording = record_activity(model) if sparse else nullcontext({})
    with recording as activity:
        for start in range(0, rows, _BATCH):
            inputs, labels = dataset.batch(split, slice(start, start + _BATCH))
            correct += int((model(inputs).argmax(-1) == labels).sum())
    model.train(was_training)
    return 100 * correct / rows, {name: layer.fraction_active for name, layer in activity.items()}


@torch.no_grad()
def layer_flops(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, int]:
    """Return the FLOPs that each named layer spends on the batch ``x``."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: seen.update({name: inputs[0]})

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: count_flops(model.get_submodule(name), seen[name]) for name in names}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass of ``model(x)``, parameters not counted.

    Every storage counts once, whole, however many tensors share it; the input ``x`` counts if the model keeps it.

    >>> saved_bytes(nn.Linear(4, 2), torch.zeros(8, 4))
    128
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    was_training = model.training
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)  # held until counted: a freed storage's address could come back
    total = sum(kept.values())
    del output
    model.train(was_training)
    return total


def peak_bytes(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """Return the most bytes that tensors hold at any moment of a training step, parameters and gradients included.

    What an operator allocates and frees inside itself is not seen.

    >>> peak_bytes(nn.Linear(4, 2), torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)) >= 8 * 4 * 4
    True
    """
    model = copy.deepcopy(model).train()
    live = _LiveBytes()
    for tensor in (x, labels, *model.parameters(), *model.buffers()):
        live.add(tensor)
    with live:
        F.cross_entropy(model(x), labels).backward()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Sums the bytes of the storages that operators return for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: Any) -> None:
            del self._known[key]
            self._now -= size

        self._known[key] = weakref.ref(storage, forget)
        self._now += size
        self.peak = max(self.peak, self._now)


def measure_step(
    models: Mapping[str, nn.Module], x: Tensor, labels: Tensor, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Return the time of a training step of each model (forward, backward, AdamW), like :func:`measure_latency`."""

    def step_of(model: nn.Module) -> Call:
        model = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        return step

    return time_in_pairs({name: (step_of(model), step_of(model)) for name, model in models.items()}, rounds)


@torch.no_grad()
def measure_latency(
    models: Mapping[str, nn.Module], x: Tensor, rounds: int = 31, *, compiling: bool = False
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return the latency of each model on ``x`` and its ratio to that of the first, timed in pairs with cold weights.

    :func:`midl.lab.pairs.time_in_pairs` says how, and what is returned. With ``compiling``, which needs a C++ compiler,
    each model runs in the form that is fastest for it on ``x``, which its ``form`` names: ``"eager"``; ``"packed"``,
    eager after :func:`midl.serving.pack_` and :func:`midl.serving.fuse_relu_`; or ``"compiled"`` by torch.compile, with
    its weights frozen.
    """
    calls = {name: _eager(model, x) for name, model in models.items()}
    if not compiling:
        return time_in_pairs(calls, rounds)
    chosen = {}
    for name, model in models.items():
        forms = {"eager": calls[name]}
        if packed := _packed(model, x):
            forms["packed"] = packed
        forms["compiled"] = (_compiled(model, x), _compiled(copy.deepcopy(model), x))
        times = time_in_pairs(forms, _ROUNDS_TO_CHOOSE, least=5, seconds=_SECONDS_TO_CHOOSE)
        chosen[name] = min(times, key=lambda form: times[form]["ratio"])
        calls[name] = forms[chosen[name]]
    measured = time_in_pairs(calls, rounds, seconds=_SECONDS)
    free_compiled()
    return {name: {**times, "form": chosen[name]} for name, times in measured.items()}


def _eager(model: nn.Module, x: Tensor) -> tuple[Call, Call]:
    return functools.partial(model, x), functools.partial(copy.deepcopy(model), x)


def _packed(model: nn.Module, x: Tensor) -> tuple[Call, Call] | None:
    """Return the calls of two packed copies, None where nothing can be packed."""
    if unavailable_reason("native"):
        return None
    copies = copy.deepcopy(model), copy.deepcopy(model)
    if not all(pack_(model) for model in copies):
        return None
    for model in copies:
        with suppress(MIDLError):  # torch.fx cannot follow it
            fuse_relu_(model)
    return functools.partial(copies[0], x), functools.partial(copies[1], x)


def _compiled(model: nn.Module, x: Tensor) -> Call:
    return functools.partial(compile_frozen(model, x), x)
