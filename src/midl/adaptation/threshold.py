"""calibrate_threshold: from the same number of groups for every input to as many as an input needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from midl.adaptation.batches import Data, collect, run
from midl.analysis.activity import LayerActivity, record_activity
from midl.analysis.flops import evaluation_mode
from midl.config import check_active, num_active_groups
from midl.errors import MIDLError
from midl.layers import MIDLayer
from midl.layers.logits import layer_logits

__all__ = ["LayerThreshold", "ThresholdReport", "calibrate_threshold"]

# The first pass sees what fixed selections do to the layers behind them, the second what thresholds do.
_PASSES = 2


@dataclasses.dataclass(frozen=True)
class LayerThreshold:
    """What one layer got; fractions are of its groups.

    Attributes:
        name: qualified name.
        threshold: gate logit that a group must reach; None where there is nothing to choose or nothing was seen.
        active: what an input should take on average.
        most: what an input may take.
        realised: what the calibration data took on average; NaN where none reached the layer.
        low: what 5 % of the choices (inputs, positions or blocks of them) stay at or below.
        high: the same for 95 %.
    """

    name: str
    threshold: float | None
    active: float
    most: float
    realised: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ThresholdReport:
    """Returned by :func:`calibrate_threshold`; ``print`` it for a table.

    Attributes:
        layers: the model's MID-L layers, in its order.
        realised: fraction of the neurons that took the full path on the calibration data, over all layers and choices.
    """

    layers: tuple[LayerThreshold, ...]
    realised: float

    def __str__(self) -> str:
        rows = [("layer", "threshold", "active", "realised", "5 % to 95 %", "most")]
        for x in self.layers:
            threshold = "none" if x.threshold is None else f"{x.threshold:.4g}"
            rows.append(
                (x.name, threshold, f"{x.active:.3f}", f"{x.realised:.3f}", f"{x.low:.3f} to {x.high:.3f}",
                 f"{x.most:.3f}")
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"whole model: {self.realised:.3f} of the neurons on average"])


def calibrate_threshold(
    model: nn.Module, data: Data, active: float | None = None, *, most: float | None = None, samples: int = 2048
) -> ThresholdReport:
    """Let every input take as many groups as it needs, ``active`` on average over ``data``; report what it takes.

    Each MID-L layer gets the threshold on its gate's logits that the wanted number of groups reaches on average, given
    that every choice takes at least one group and at most ``most``. :func:`midl.set_active`, or assigning
    ``layer.active`` or ``layer.threshold = None``, goes back to the same number for all. Memory does not grow with the
    data. On an error the model is as before.

    >>> from midl import MIDLinear
    >>> model = nn.Sequential(MIDLinear(32, 256, active=0.25), nn.ReLU(), nn.Linear(256, 10))
    >>> report = calibrate_threshold(model, torch.randn(1000, 32))
    >>> abs(report.layers[0].realised - 0.25) < 0.01
    True

    Args:
        model: converted, adapted or trained; the weights stay.
        data: inputs like those to come, as :func:`midl.adapt` takes them.
        active: wanted average fraction of the groups, in (0, 1]; ``None``: what each layer has.
        most: largest fraction for one choice, at least ``active``; ``None``: twice ``active``, at most 1.
        samples: inputs to calibrate on, from the start of ``data``.

    Raises:
        MIDLError: a fraction out of range, a model without MID-L layers, or data that does not fit it.
    """
    if active is not None:
        check_active("calibrate_threshold", active)
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, MIDLayer) and (m.active or active is not None)
    }
    if not layers:
        raise MIDLError(f"calibrate_threshold: the {type(model).__name__} has no MID-L layers that select")
    least = max((x.active for x in layers.values()), default=0.0) if active is None else active
    if most is not None and not (isinstance(most, (int, float)) and least <= most <= 1):
        raise MIDLError(f"calibrate_threshold: most={most!r}, expected a number from active={least:g} to 1")
    batches = collect(data, samples)
    with _restored_on_error(layers.values()):
        for layer in layers.values():  # also takes an earlier threshold away
            layer.active = layer.active if active is None else active
        for _ in range(_PASSES):
            for layer, tail in zip(layers.values(), _watch_tails(model, batches, layers, most), strict=True):
                if (threshold := tail.threshold(layer.num_selected)) is not None:
                    share = tail.slots / layer.num_groups
                    layer.config = layer.config.replace(threshold=threshold, most=share)
        with evaluation_mode(model), torch.no_grad(), record_activity(model) as activity:
            for batch in batches:
                run(model, batch)
    return ThresholdReport(
        tuple(_describe(name, layer, activity[name]) for name, layer in layers.items()), activity.fraction_active
    )


def _describe(name: str, layer: MIDLayer, seen: LayerActivity) -> LayerThreshold:
    return LayerThreshold(
        name, layer.threshold, layer.num_selected / layer.num_groups, layer.num_slots / layer.num_groups,
        seen.fraction_active, seen.quantile(0.05), seen.quantile(0.95),
    )  # fmt: skip


@contextmanager
def _restored_on_error(layers: Any) -> Iterator[None]:
    configs = [(layer, layer.config) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, config in configs:
            layer.config = config
        raise


@torch.no_grad()
def _watch_tails(
    model: nn.Module, batches: Sequence[Any], layers: Mapping[str, MIDLayer], most: float | None
) -> list[_Tail]:
    """Return how the logits of each layer are distributed over the batches."""
    tails, handles = [], []
    for layer in layers.values():
        share = min(1.0, 2 * layer.active) if most is None else most
        tail = _Tail(max(layer.num_selected, num_active_groups(share, layer.num_groups)))
        tails.append(tail)

        def watch(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], tail: _Tail = tail) -> None:
            tail.add(layer_logits(module, *args, **kwargs))

        handles.append(layer.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        with evaluation_mode(model):
            for batch in batches:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return tails


_BIN_BITS = 16
_SIGN = 2**31


class _Tail:
    """The logits behind the first of each choice, down to the last that it may take, as a histogram.

    A choice takes its first group and those of the tail that reach the threshold, so that the wanted average fixes how
    many of all tails must reach it. Bins hold equal upper halves of a float32, in the order of the numbers; within a
    bin, less than 1 % wide, logits are taken to lie evenly.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.counts = torch.zeros(2**_BIN_BITS, dtype=torch.int64)
        self.choices = 0

    def add(self, logits: Tensor) -> None:
        """Count the tails of logits (choices, N)."""
        ranked = torch.where(logits.isnan(), -math.inf, logits).float().topk(self.slots).values[:, 1:]
        bits = (ranked + 0.0).contiguous().view(torch.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        bins = (keys >> _BIN_BITS) + 2 ** (_BIN_BITS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).cpu()
        self.choices += len(logits)

    def threshold(self, groups: int) -> float | None:
        """Return the threshold at which ``groups`` are taken on average; None without choices or a tail."""
        if self.slots == 1 or self.choices == 0:
            return None
        wanted = (groups - 1) * self.choices
        above = self.counts.flip(0).cumsum(0).flip(0)  # logits in this bin and those above
        filled = self.counts.nonzero().flatten()
        at = int(filled[(above[filled] >= wanted).nonzero().flatten()[-1]])
        share = (wanted - int(above[at]) + int(self.counts[at])) / int(self.counts[at])
        key = math.ceil((at + 1 - share) * 2**_BIN_BITS) - _SIGN
        bits = torch.tensor(key if key >= 0 else key ^ 0x7FFFFFFF, dtype=torch.int32)
        # At the edge of an infinity's bin lie NaNs of the same sign.
        limit = torch.finfo(torch.float32).max
        return float(bits.view(torch.float32).nan_to_num(math.copysign(limit, key)))
