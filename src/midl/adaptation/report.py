"""What adapt did: one row per layer, and what it cost and saved."""

from __future__ import annotations

import dataclasses

from midl.adaptation.threshold import ThresholdReport

__all__ = ["AdaptReport", "AdaptedLayer"]


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """What happened to one layer; FLOPs are per input of the model.

    Attributes:
        name: qualified name.
        changed: whether it is a MID-L layer now.
        detail: why it stayed dense; empty for a changed layer.
        active: fraction of groups on the full path; 0: the layer is its light path alone.
        rank: width of the code.
        gate: ``"projection"`` or ``"light"``.
        flops_before: of the dense layer.
        flops_after: of the layer now.
        captured: share of the energy lost on the light path that the gate's choice wins back, on rows of the
            calibration data to which the gate was not fitted.
        oracle: the same for the best possible choice.
        regrouped: whether its neurons changed places, so that those that matter together share a group.
        dropped_rows: output rows with NaN or infinite values, left out.
        latency_before: seconds that the dense layer takes in one call of the model; None without ``latency_inputs``.
        latency_after: what the layer takes now, by interpolation between densities that were timed.
    """

    name: str
    changed: bool
    detail: str = ""
    active: float = 1.0
    rank: int = 0
    gate: str = ""
    flops_before: float = 0.0
    flops_after: float = 0.0
    captured: float = 1.0
    oracle: float = 1.0
    regrouped: bool = False
    dropped_rows: int = 0
    latency_before: float | None = None
    latency_after: float | None = None


@dataclasses.dataclass(frozen=True)
class AdaptReport:
    """Returned by :func:`midl.adapt`; ``print`` it for a table.

    Attributes:
        layers: the layers that could be converted, in the model's order.
        flops_before: FLOPs of the whole model per input.
        flops_after: likewise.
        error_initialised: mean square of the change in the model's output, relative to the output's variance, on the
            calibration data after the conversion.
        error: the same at the end, after distillation.
        losses: of every epoch of distillation.
        thresholds: what inputs take, where it differs from input to input; FLOPs are then averages.
        latency_before: median seconds of one call of the dense model on ``latency_inputs``; None without them.
        latency_after: the same of the adapted one, measured in turns with it.
    """

    layers: tuple[AdaptedLayer, ...]
    flops_before: float
    flops_after: float
    error_initialised: float
    error: float
    losses: tuple[float, ...] = ()
    thresholds: ThresholdReport | None = None
    latency_before: float | None = None
    latency_after: float | None = None

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the whole model before, divided by those after."""
        return self.flops_before / self.flops_after

    @property
    def latency_ratio(self) -> float | None:
        """Time of one call before, divided by that after, on ``latency_inputs``; None without them."""
        return _ratio(self.latency_before, self.latency_after)

    @property
    def changed(self) -> tuple[AdaptedLayer, ...]:
        """The layers that are MID-L layers now."""
        return tuple(layer for layer in self.layers if layer.changed)

    @property
    def kept(self) -> tuple[AdaptedLayer, ...]:
        """The layers that stayed dense; ``detail`` says why."""
        return tuple(layer for layer in self.layers if not layer.changed)

    def __str__(self) -> str:
        timed = self.latency_ratio is not None
        header = ("layer", "active", "rank", "gate", "FLOPs", *(("time",) if timed else ()), "captured", "oracle", "")
        rows = [header, *(_cells(layer, timed) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        total = f"whole model {self.flops_ratio:.2f}x fewer FLOPs"
        total += f", {self.latency_ratio:.2f}x as fast" if self.latency_ratio is not None else ""
        total += f"; output error {self.error_initialised:.2%}"
        if self.losses:
            total += f", after {len(self.losses)} epochs of distillation {self.error:.2%}"
        if self.thresholds is None:
            return "\n".join([*lines, total])
        if not self.losses:
            total += f", with thresholds {self.error:.2%}"
        return "\n".join([*lines, total, str(self.thresholds)])


def _ratio(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before / after


def _cells(layer: AdaptedLayer, timed: bool) -> tuple[str, ...]:
    ratios = [f"{layer.flops_before / layer.flops_after:.2f}x" if layer.changed else "1.00x"]
    if timed:
        faster = _ratio(layer.latency_before, layer.latency_after)
        ratios.append("" if faster is None else f"{faster:.2f}x")
    if not layer.changed:
        return (layer.name, "dense", "", "", *ratios, "", "", layer.detail)
    notes = ["regrouped"] if layer.regrouped else []
    notes += [f"{layer.dropped_rows} rows with NaN or Inf left out"] if layer.dropped_rows else []
    if not layer.active:
        return (layer.name, "0", str(layer.rank), "", *ratios, "", "", ", ".join(["light path alone", *notes]))
    return (
        layer.name, f"{layer.active:.3f}", str(layer.rank), layer.gate, *ratios, f"{layer.captured:.3f}",
        f"{layer.oracle:.3f}", ", ".join(notes),
    )  # fmt: skip
