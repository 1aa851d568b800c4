"""The data that adaptation reads: batches in, one output tensor out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from midl.errors import MIDLError

__all__ = ["Data", "collect", "run", "size_of"]

Data = Tensor | Iterable[Any]
"""A tensor of inputs, or batches: a tensor, a dict of keyword arguments, or a tuple whose first element is one of them
(what follows, such as labels, is not used)."""

_BATCH = 128


def batches_of(data: Data) -> Iterable[Any]:
    """Return ``data`` as batches; one tensor is split into batches of 128 rows."""
    if isinstance(data, Tensor):
        return data.split(_BATCH)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise MIDLError(f"adapt: data is a {type(data).__name__}, expected a tensor or an iterable of batches")
    return data


def collect(data: Data, samples: int) -> list[Any]:
    """Return the inputs of the first batches of ``data``, at least ``samples`` inputs where there are as many.

    >>> [len(batch) for batch in collect(torch.zeros(300, 4), samples=200)]
    [128, 128]

    Raises:
        MIDLError: ``data`` is empty or no data at all.
    """
    found: list[Any] = []
    total = 0
    for batch in batches_of(data):
        inputs = inputs_of(batch)
        if size_of(inputs) == 0:
            continue
        found.append(inputs)
        total += size_of(inputs)
        if total >= samples:
            break
    if total == 0:
        raise MIDLError("adapt: data is empty, expected at least one batch of inputs")
    return found


def inputs_of(batch: Any, what: str = "data has a batch") -> Tensor | Mapping[str, Any]:
    """Return the inputs of a batch, without labels; errors call it ``what``."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inputs, (Tensor, Mapping)) and any(True for _ in _tensors(inputs)):
        return inputs
    raise MIDLError(
        f"adapt: {what} of type {type(inputs).__name__}, expected a tensor, a dict of tensors, or a tuple that starts "
        "with one"
    )


def size_of(inputs: Any) -> int:
    """Return the number of inputs in a batch: the length of its first tensor."""
    first = next(_tensors(inputs))
    return first.shape[0] if first.dim() else 1


def run(model: nn.Module, inputs: Any, what: str = "the data") -> Tensor:
    """Return the model's output on one batch: the tensor itself, or the first of floats in its ``logits`` or in it.

    Errors call the batch ``what``.

    Raises:
        MIDLError: the model does not take the data, or gives no floating-point tensor.
    """
    # The parameters of packed layers have no data and are on the meta device.
    place = next((t.device for t in model.parameters() if not t.is_meta), torch.device("cpu"))
    try:
        if isinstance(inputs, Mapping):
            output = model(**{k: v.to(place) if isinstance(v, Tensor) else v for k, v in inputs.items()})
        else:
            output = model(inputs.to(place))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(t.shape) for t in _tensors(inputs)]
        raise MIDLError(
            f"adapt: the {type(model).__name__} does not take {what}, a batch of shape {shapes[0]}: {error}"
        ) from error
    logits = None if isinstance(output, Tensor) else getattr(output, "logits", None)
    found = next((t for t in _tensors(output if logits is None else logits) if t.is_floating_point()), None)
    if found is None:
        raise MIDLError(f"adapt: the {type(model).__name__} returns a {type(output).__name__}, expected a float tensor")
    if found.dim() == 0 or found.shape[-1] == 0:
        raise MIDLError(
            f"adapt: the {type(model).__name__} returns a tensor of shape {tuple(found.shape)}, expected outputs for "
            "every input (a loss cannot be adapted to)"
        )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
