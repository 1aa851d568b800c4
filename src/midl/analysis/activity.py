"""record_activity: which groups the inputs of a model selected, and how often."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from midl.errors import MIDLError
from midl.layers.base import MIDLayer, observers

__all__ = ["Activity", "LayerActivity", "record_activity"]


class LayerActivity:
    """What one MID-L layer selected while it was recorded.

    Attributes:
        counts: how often each group was selected, int64 (N,).
        sizes: how many selections had 0, 1, ... N groups, int64 (N + 1,); without a threshold all have k.
        choices: how many selections were made (input rows, or blocks of positions that share one).
        group_size: neurons per group.
    """

    def __init__(self, num_groups: int, group_size: int) -> None:
        self.counts = torch.zeros(num_groups, dtype=torch.int64)
        self.sizes = torch.zeros(num_groups + 1, dtype=torch.int64)
        self.choices = 0
        self.group_size = group_size

    def add(self, selected: Tensor) -> None:
        """Count a batch of selections, (..., k) indices, -1 in slots without a group."""
        taken = selected.detach() >= 0
        sizes = torch.bincount(taken.sum(-1).flatten(), minlength=self.sizes.numel()).cpu()
        self.counts += torch.bincount(selected[taken], minlength=self.counts.numel()).cpu()
        self.sizes += sizes
        self.choices += int(sizes.sum())

    @property
    def usage(self) -> Tensor:
        """Fraction of the choices that selected each group, float64 (N,); NaN before the first choice."""
        return self.counts.double() / self.choices

    @property
    def fraction_active(self) -> float:
        """Mean fraction of the neurons that took the full path; NaN before the first choice."""
        total = self.choices * self.counts.numel()
        return int(self.counts.sum()) / total if total else math.nan

    def quantile(self, share: float) -> float:
        """Return the fraction of the neurons that a ``share`` of the choices stays at or below; NaN before the first.

        Args:
            share: of the choices, in [0, 1]; 0.5 for the median.
        """
        if not self.choices:
            return math.nan
        reached = self.sizes.cumsum(0) >= max(1, math.ceil(share * self.choices))
        return int(reached.nonzero()[0]) / self.counts.numel()

    @property
    def dead(self) -> Tensor:
        """Indices of the groups that were never selected."""
        return (self.counts == 0).nonzero().flatten()

    @property
    def always_on(self) -> Tensor:
        """Indices of the groups that every choice selected."""
        return (self.counts == self.choices).nonzero().flatten() if self.choices else self.counts.new_empty(0)

    @property
    def entropy(self) -> float:
        """Entropy of the usage in bits, from log2(k) (always the same groups) to log2(N) (all equally often)."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(-(share * share.clamp(min=1e-300).log2()).sum())

    def __repr__(self) -> str:
        low, high = self.quantile(0.05), self.quantile(0.95)
        spread = f" ({low:.3f} to {high:.3f})" if low < high else ""
        return (
            f"LayerActivity(active={self.fraction_active:.3f}{spread}, choices={self.choices}, "
            f"groups={self.counts.numel()}, dead={self.dead.numel()}, always_on={self.always_on.numel()}, "
            f"entropy={self.entropy:.2f} of {math.log2(self.counts.numel()):.2f} bits)"
        )


class Activity(Mapping[str, LayerActivity]):
    """Activity of every MID-L layer of a model, by qualified name."""

    def __init__(self, layers: dict[str, LayerActivity]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> LayerActivity:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def fraction_active(self) -> float:
        """Fraction of neurons that took the full path, over all neurons of all layers and all their choices."""
        active = sum(int(a.counts.sum()) * a.group_size for a in self.values())
        total = sum(a.choices * a.counts.numel() * a.group_size for a in self.values())
        return active / total if total else math.nan

    def __repr__(self) -> str:
        return "\n".join(f"{name or '(model)'}: {layer!r}" for name, layer in self.items())


class record_activity:  # noqa: N801 - a verb that users call, used as a context manager
    """Record, inside a ``with`` block, which groups the MID-L layers of ``model`` select.

    >>> from midl import MIDLinear
    >>> model = nn.Sequential(MIDLinear(16, 32, active=0.25, rank=2), nn.ReLU())
    >>> with record_activity(model) as activity:
    ...     y = model(torch.randn(100, 16))
    >>> activity["0"].fraction_active
    0.25

    Costs nothing outside the block. Recordings nest. Copies of the model made inside the block are not recorded.

    Raises:
        MIDLError: the model has no MID-L layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[MIDLayer, LayerActivity] = {}
        names: dict[str, LayerActivity] = {}
        for name, module in model.named_modules():
            if isinstance(module, MIDLayer):
                names[name] = self._layers[module] = LayerActivity(module.num_groups, module.config.group_size)
        if not names:
            raise MIDLError(f"record_activity: the {type(model).__name__} has no MID-L layers")
        self.activity = Activity(names)

    def _record(self, layer: MIDLayer, selected: Tensor) -> None:
        if layer in self._layers:
            self._layers[layer].add(selected)

    def __enter__(self) -> Activity:
        observers.append(self._record)
        return self.activity

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        observers.remove(self._record)
