"""What a conversion did: one row per module that has parameters of its own, and the totals."""

from __future__ import annotations

import dataclasses

from midl.config import MIDConfig

__all__ = ["ConversionReport", "LayerChange"]


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """What happened to one module.

    FLOPs are for one input row of a linear layer or one output position of a convolution, two per multiply-add.
    """

    name: str
    kind: str
    changed: bool
    detail: str
    config: MIDConfig | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    flops_before: int = 0
    flops_after: int = 0


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Returned by ``convert_`` and ``revert_``; ``print`` it for a table.

    Attributes:
        layers: every module that has parameters of its own, in the model's order.
        parameters_before: unique parameters of the whole model before, and ``parameters_after`` after.
        flops_before: FLOPs of the whole model on ``example_inputs`` before, and ``flops_after`` after; None without.
    """

    layers: tuple[LayerChange, ...]
    parameters_before: int
    parameters_after: int
    flops_before: int | None = None
    flops_after: int | None = None

    @property
    def changed(self) -> tuple[LayerChange, ...]:
        """The modules that were replaced."""
        return tuple(layer for layer in self.layers if layer.changed)

    @property
    def kept(self) -> tuple[LayerChange, ...]:
        """The modules that were left as they are; ``detail`` says why."""
        return tuple(layer for layer in self.layers if not layer.changed)

    @property
    def flops_ratio(self) -> float:
        """FLOPs before divided by FLOPs after, summed over the replaced layers (one row or position of each)."""
        return sum(c.flops_before for c in self.changed) / sum(c.flops_after for c in self.changed)

    def __str__(self) -> str:
        header = ("layer", "type", "changed", "parameters", "FLOPs per row", "")
        rows = [
            (
                layer.name,
                layer.kind,
                "yes" if layer.changed else "no",
                _before_after(layer.parameters_before, layer.parameters_after),
                _before_after(layer.flops_before, layer.flops_after) if layer.changed else "",
                layer.detail,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in [header, *rows]
        ]
        total = f"{len(self.changed)} of {len(self.layers)} layers changed; parameters "
        total += _before_after(self.parameters_before, self.parameters_after)
        if self.changed:
            total += f"; {self.flops_ratio:.2f}x fewer FLOPs in the changed layers"
        if self.flops_before is not None and self.flops_after:
            total += f"; whole model {_before_after(self.flops_before, self.flops_after)} FLOPs"
        return "\n".join([*lines, total])


def _before_after(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"
