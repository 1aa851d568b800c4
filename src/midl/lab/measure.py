"""What the lab measures of a trained model: accuracy, activity, FLOPs, latency, bytes kept for the backward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from midl.analysis import LayerActivity, count_flops, record_activity
from midl.lab.data import Dataset
from midl.layers import MIDLayer

__all__ = ["layer_flops", "measure_accuracy", "measure_latency", "saved_bytes"]

_BATCH = 500


@torch.no_grad()
def measure_accuracy(model: nn.Module, dataset: Dataset) -> tuple[float, dict[str, float]]:
    """Return the accuracy on the test rows, in percent, and the measured fraction of active neurons per MID-L layer.

    Both come from the same forward passes, in evaluation mode; the model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    sparse = any(isinstance(module, MIDLayer) for module in model.modules())
    correct, rows = 0, len(dataset.test)
    recording: AbstractContextManager[Mapping[str, LayerActivity]]
    recording = record_activity(model) if sparse else nullcontext({})
    with recording as activity:
        for start in range(0, rows, _BATCH):
            inputs, labels = dataset.batch(dataset.test, slice(start, start + _BATCH))
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


@torch.no_grad()
def measure_latency(models: Mapping[str, nn.Module], x: Tensor, rounds: int = 31) -> dict[str, dict[str, float]]:
    """Return the latency of each model on ``x``: median and quartiles over ``rounds``, in seconds.

    The rounds are interleaved: each times every model once, starting with another one each time, so that what else
    the machine does meets all alike. A timing repeats the call until it takes about 2 ms.
    """
    repeats = {}
    for name, model in models.items():
        model(x)
        repeats[name] = max(1, round(0.002 / max(_time(model, x, 3), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            samples[name].append(_time(models[name], x, repeats[name]))
    return {name: _quartiles(values) for name, values in samples.items()}


def _time(model: nn.Module, x: Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        model(x)
    return (time.perf_counter() - start) / repeats


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}
