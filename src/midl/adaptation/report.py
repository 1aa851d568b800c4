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
    """

    layers: tuple[AdaptedLayer, ...]
    flops_before: float
    flops_after: float
    error_initialised: float
    error: float
    losses: tuple[float, ...] = ()
    thresholds: ThresholdReport | None = None

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the whole model before, divided by those after."""
        return self.flops_before / self.flops_after

    @property
    def changed(self) -> tuple[AdaptedLayer, ...]:
        """The layers that are MID-L layers now."""
        return tuple(layer for layer in self.layers if layer.changed)

    @property
    def kept(self) -> tuple[AdaptedLayer, ...]:
        """The layers that stayed dense; ``detail`` says why."""
        return tuple(layer for layer in self.layers if not layer.changed)

    def __str__(self) -> str:
        header = ("layer", "active", "rank", "gate", "FLOPs", "captured", "oracle", "")
        rows = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        total = f"whole model {self.flops_ratio:.2f}x fewer FLOPs; output error {self.error_initialised:.2%}"
        if self.losses:
            total += f", after {len(self.losses)} epochs of distillation {self.error:.2%}"
        if self.thresholds is None:
            return "\n".join([*lines, total])
        if not self.losses:
            total += f", with thresholds {self.error:.2%}"
        return "\n".join([*lines, total, str(self.thresholds)])


def _cells(layer: AdaptedLayer) -> tuple[str, ...]:
    if not layer.changed:
        return (layer.name, "dense", "", "", "1.00x", "", "", layer.detail)
    notes = ["regrouped"] if layer.regrouped else []
    notes += [f"{layer.dropped_rows} rows with NaN or Inf left out"] if layer.dropped_rows else []
    ratio = f"{layer.flops_before / layer.flops_after:.2f}x"
    if not layer.active:
        return (layer.name, "0", str(layer.rank), "", ratio, "", "", ", ".join(["light path alone", *notes]))
    return (
        layer.name, f"{layer.active:.3f}", str(layer.rank), layer.gate, ratio, f"{layer.captured:.3f}",
        f"{layer.oracle:.3f}", ", ".join(notes),
    )  # fmt: skip
