"""What the lab asks of every architecture, and the search for the widest one within a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from midl.analysis import count_flops
from midl.errors import MIDLError

__all__ = ["Architecture", "describe", "widest"]


class Architecture(Protocol):
    """The sizes of a network, as a frozen dataclass: equal sizes compare equal, ``dataclasses.replace`` changes one."""

    @property
    def dropout(self) -> float:
        """Rate of ``nn.Dropout`` behind the layers named by ``layer_names``; 0: the network has none."""

    @property
    def num_classes(self) -> int:
        """Outputs."""

    @property
    def layer_names(self) -> list[str]:
        """Qualified names of the layers that carry the FLOPs and that methods replace; the others stay dense."""

    def build(self) -> nn.Module:
        """Return a freshly initialised dense network; its weights follow from torch's random state."""

    def example(self, batch: int = 1) -> Tensor:
        """Return a batch of inputs of the right shape and dtype."""

    def narrow(self, flops: int) -> Architecture:
        """Return the widest version, all widths scaled alike, of at most ``flops`` per input.

        Raises:
            MIDLError: not even the narrowest version fits.
        """


def describe(architecture: Architecture) -> dict[str, Any]:
    """Return an architecture's name and sizes as JSON values."""
    sizes = dataclasses.asdict(architecture)  # type: ignore[call-overload]
    return {"type": type(architecture).__name__} | {
        name: list(size) if isinstance(size, tuple) else size for name, size in sizes.items()
    }


AnyArchitecture = TypeVar("AnyArchitecture", bound=Architecture)


def widest(scaled: Callable[[int], AnyArchitecture], steps: int, flops: int) -> AnyArchitecture:
    """Return ``scaled(step)`` of the largest step from 1 to ``steps`` that needs at most ``flops`` per input.

    Args:
        scaled: from a step to an architecture; more steps never need fewer FLOPs.
        steps: the step of the unscaled architecture.
        flops: the budget per input.

    Raises:
        MIDLError: ``scaled(1)`` needs more.
    """
    low, high = 1, steps
    if _flops(scaled(low)) > flops:
        kind = type(scaled(low)).__name__
        raise MIDLError(
            f"{kind}.narrow: flops={flops}, expected at least {_flops(scaled(low))} (the narrowest version)"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _flops(scaled(middle)) <= flops else (low, middle - 1)
    return scaled(low)


def _flops(architecture: Architecture) -> int:
    with torch.device("meta"):
        return count_flops(architecture.build(), architecture.example())
