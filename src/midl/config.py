"""MIDConfig: every choice that makes a dense layer a MID-L layer, and the arithmetic of its budget."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, get_args

from midl.errors import MIDLError

__all__ = ["CONVERSION", "MIDConfig", "auto_rank", "num_active_groups"]

Gate = Literal["projection", "light"]
Interpolation = Literal["sigmoid", "hard"]
StraightThrough = Literal["dense", "selected"]
Select = Literal["position", "image"]


@dataclasses.dataclass(frozen=True)
class MIDConfig:
    """How to turn a dense layer into a MID-L layer; the same for linear layers and convolutions.

    >>> config = MIDConfig(active=0.45, group_size=32)
    >>> MIDConfig.from_json(config.to_json()) == config
    True

    Args:
        active: fraction of the neuron groups that take the full path, at least one group; with a threshold, the
            average over inputs that it was calibrated for. 0: none ever, the light path alone.
        rank: width of the low-rank code, or ``"auto"``: the largest that meets ``flops_ratio``.
        flops_ratio: with ``rank="auto"``, dense multiply-adds divided by the layer's, at least this (the paper: 1.7).
        group_size: neurons selected together (1: each neuron alone, as in the paper). Must divide the layer's width.
        span: neighbouring positions that share one selection: along the second-to-last axis of a sequence, along a
            row of an image. 1: every position chooses for itself.
        gate: ``"projection"``: logits are a learned linear map of the code. ``"light"``: logits are the group
            means of the light path plus bias; no gate weights.
        interpolation: ``"sigmoid"``: a selected group is weighted by ``sigmoid(logit)``. ``"hard"``: by one.
        ste: straight-through gradient of the gate. ``"selected"``: from the selected groups alone, so the backward
            pass is sparse too. ``"dense"``: from every group; training then computes every neuron.
        noise: standard deviation of Gaussian noise added to the logits for the selection, while training only.
        select: convolutions only. ``"position"``: every output pixel chooses. ``"image"``: one choice per image.
        threshold: gate logit that a group must reach to be selected, so that inputs take as many as they need: at
            least one, at most the fraction ``most``. ``None``: every input takes the same number, ``active``. Set by
            :func:`midl.adaptation.calibrate_threshold`.
        most: with a threshold, the largest fraction of the groups that an input may take, in (0, 1].

    Raises:
        MIDLError: a value outside its range; the message names it.

    Source: P. Shaeri, A. Middel, "MID-L: Matrix-Interpolated Dropout Layer with Layer-wise Neuron Selection",
    arXiv 2505.11416. Groups, span, the light gate and hard interpolation are ours.
    """

    active: float = 0.45
    rank: int | Literal["auto"] = "auto"
    flops_ratio: float = 1.7
    group_size: int = 1
    span: int = 1
    gate: Gate = "projection"
    interpolation: Interpolation = "sigmoid"
    ste: StraightThrough = "selected"
    noise: float = 0.0
    select: Select = "position"
    threshold: float | None = None
    most: float = 1.0

    def __post_init__(self) -> None:
        check_active("MIDConfig", self.active, zero=True)
        if self.rank != "auto":
            check_positive_int("MIDConfig", "rank", self.rank, "a positive int or 'auto'")
        check_positive_int("MIDConfig", "group_size", self.group_size)
        check_positive_int("MIDConfig", "span", self.span)
        if not _is_number(self.flops_ratio) or not self.flops_ratio > 0:
            raise MIDLError(f"MIDConfig: flops_ratio={self.flops_ratio!r}, expected a number above 0")
        if self.threshold is not None and not _is_number(self.threshold):
            raise MIDLError(f"MIDConfig: threshold={self.threshold!r}, expected a finite number or None")
        if self.threshold is not None and self.active == 0:
            raise MIDLError(
                f"MIDConfig: threshold={self.threshold!r} with active=0, expected None: nothing is selected"
            )
        if not _is_number(self.most) or not 0 < self.most <= 1:
            raise MIDLError(f"MIDConfig: most={self.most!r}, expected a number in (0, 1]")
        if not _is_number(self.noise) or not self.noise >= 0:
            raise MIDLError(f"MIDConfig: noise={self.noise!r}, expected a standard deviation of at least 0")
        for name, choices in (
            ("gate", Gate),
            ("interpolation", Interpolation),
            ("ste", StraightThrough),
            ("select", Select),
        ):
            if getattr(self, name) not in get_args(choices):
                raise MIDLError(f"MIDConfig: {name}={getattr(self, name)!r}, expected one of {get_args(choices)}")
        if self.select == "image" and self.span != 1:
            raise MIDLError(f"MIDConfig: span={self.span} with select='image', expected 1 (an image is one block)")

    def replace(self, **changes: Any) -> MIDConfig:
        """Return a copy with some fields changed; an unknown field is an error.

        >>> MIDConfig().replace(active=0.3).active
        0.3
        """
        _check_fields(changes)
        return dataclasses.replace(self, **changes)

    def num_slots(self, num_groups: int) -> int:
        """Return how many of ``num_groups`` groups an input takes, with a threshold at most.

        >>> MIDConfig(active=0.25).num_slots(64), MIDConfig(active=0.25, threshold=0.0, most=0.5).num_slots(64)
        (16, 32)
        """
        return num_active_groups(self.active if self.threshold is None else self.most, num_groups)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MIDConfig:
        """Build a configuration from :meth:`to_dict`'s result; an unknown field is an error."""
        _check_fields(fields)
        return cls(**fields)

    def to_json(self) -> str:
        """Return the configuration as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> MIDConfig:
        """Build a configuration from :meth:`to_json`'s result."""
        return cls.from_dict(json.loads(text))


def _check_fields(fields: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(MIDConfig)]
    for name in fields:
        if name not in known:
            raise MIDLError(f"MIDConfig: unknown field {name!r}, expected one of {known}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_active(owner: str, active: object, *, zero: bool = False) -> None:
    """Raise unless ``active`` is a number in (0, 1], or 0 where that is allowed."""
    if not _is_number(active) or not 0 <= active <= 1 or (active == 0 and not zero):  # type: ignore[operator]
        raise MIDLError(f"{owner}: active={active!r}, expected a number in {'[' if zero else '('}0, 1]")


def check_positive_int(owner: str, name: str, value: object, expected: str = "a positive int") -> None:
    """Raise unless ``value`` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MIDLError(f"{owner}: {name}={value!r}, expected {expected}")


def num_active_groups(active: float, num_groups: int) -> int:
    """Return k, how many of ``num_groups`` groups a fraction ``active`` selects: at least 1, unless it is 0.

    >>> num_active_groups(0.45, 128), num_active_groups(0.001, 128), num_active_groups(0, 128)
    (58, 1, 0)
    """
    return max(1, round(active * num_groups)) if active else 0


def layer_macs(
    fan_in: int, out_features: int, rank: int, *, num_selected: int, group_size: int, gate: Gate,
    neuron_macs: int | None = None, light_width: int | None = None,
) -> int:  # fmt: skip
    """Return the multiply-adds of a MID-L layer for one input row: code, light path, gate and selected neurons.

    Args:
        fan_in: inputs of one neuron: ``in_features``, or channels times kernel area.
        out_features: neurons, n.
        rank: width of the code, r.
        num_selected: selected groups, k.
        group_size: neurons of a group, G.
        gate: only the projection gate multiplies (r per group).
        neuron_macs: of one neuron; default ``fan_in``.
        light_width: outputs of the light path; default ``out_features``.

    >>> layer_macs(1024, 4096, 107, num_selected=58, group_size=32, gate="projection")
    2462080
    """
    gate_macs = rank * (out_features // group_size) if gate == "projection" else 0
    neuron_macs = fan_in if neuron_macs is None else neuron_macs
    light_width = out_features if light_width is None else light_width
    return rank * fan_in + rank * light_width + gate_macs + num_selected * group_size * neuron_macs


def auto_rank(
    fan_in: int, out_features: int, *, active: float, group_size: int, gate: Gate, flops_ratio: float, owner: str,
    neuron_macs: int | None = None, light_width: int | None = None,
) -> int:  # fmt: skip
    """Return the largest rank whose multiply-adds stay at or below the dense layer's divided by ``flops_ratio``.

    ``neuron_macs`` and ``light_width`` are as for :func:`layer_macs`.

    >>> auto_rank(1024, 4096, active=0.45, group_size=32, gate="projection", flops_ratio=1.7, owner="example")
    107

    Raises:
        MIDLError: not even rank 1 fits; the message says the largest ``active`` and ``flops_ratio`` that do.
    """
    num_groups = out_features // group_size
    dense = (fan_in if neuron_macs is None else neuron_macs) * out_features
    # Exact, as the decimal that was written: in floating point 242 / 2.2 misses 110.
    budget = int(dense / Fraction(str(float(flops_ratio))))

    def macs(rank: int, num_selected: int) -> int:
        return layer_macs(
            fan_in, out_features, rank, num_selected=num_selected, group_size=group_size, gate=gate,
            neuron_macs=neuron_macs, light_width=light_width,
        )  # fmt: skip

    k = num_active_groups(active, num_groups)
    per_rank = macs(1, k) - macs(0, k)
    rank = min((budget - macs(0, k)) // per_rank, fan_in, light_width or out_features)
    if rank >= 1:
        return rank
    fitting = [j for j in range(1, num_groups + 1) if macs(1, j) <= budget]
    largest = f"active={_floor(fitting[-1] / num_groups):g}" if fitting else "no active at all"
    raise MIDLError(
        f"{owner}: rank='auto' finds no rank for active={active:g}, group_size={group_size}, "
        f"flops_ratio={flops_ratio:g} (in={fan_in}, out={out_features}): {k} of {num_groups} groups at rank 1 cost "
        f"{macs(1, k)} multiply-adds, the budget is {budget}; expected at most {largest} at this flops_ratio, "
        f"flops_ratio <= {_floor(dense / macs(1, k)):g} at this active, or an explicit rank"
    )


def _floor(value: float) -> float:
    """Round down to four significant digits, so that a bound that is printed is met."""
    digits = 3 - math.floor(math.log10(value))
    return math.floor(value * 10**digits) / 10**digits


CONVERSION = MIDConfig(gate="light", interpolation="hard")
"""What trained layers become where nobody says otherwise: selected neurons keep their values, and the light path of a
trained weight ranks its groups well without training. Of the ablation in docs/adapt.md the best of its kind."""
