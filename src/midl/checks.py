"""Checks of arguments that several functions share; each raises an error that names the function and the argument."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from midl.errors import MIDLError

__all__ = ["check_callable", "check_module", "uncompiled"]


def uncompiled(model: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped, or ``model`` where it did not."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


def check_module(owner: str, model: Any) -> None:
    """Raise unless ``model`` is a module whose parameters have their shapes."""
    if not isinstance(model, nn.Module):
        raise MIDLError(f"{owner}: model is a {type(model).__name__}, expected torch.nn.Module")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise MIDLError(
                f"{owner}: the model's {name} has no shape yet (a lazy module), expected a model that has seen a batch"
            )


def check_callable(owner: str, name: str, value: Any) -> None:
    """Raise unless ``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise MIDLError(f"{owner}: {name} is a {type(value).__name__}, expected something to call")
