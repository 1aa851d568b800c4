"""Plots of a comparison, as PNG files; no display is needed."""

from __future__ import annotations

import io
from pathlib import Path

from midl.lab.compare import Comparison
from midl.lab.files import write_bytes
from midl.lab.methods import find

__all__ = ["plot_accuracy"]


def plot_accuracy(comparison: Comparison, path: Path) -> None:
    """Draw test accuracy against FLOPs per input: each seed a dot, mean and standard deviation on top."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(comparison.rows.values()):
        flops = row.flops / 1e6
        # Methods of the same budget lie side by side.
        x = flops * (1 + 0.004 * (i - 1.5))
        axes.scatter([x] * len(row.accuracies), row.accuracies, s=14, alpha=0.45, color=f"C{i}")
        axes.errorbar(
            x, row.accuracy, yerr=row.spread or 0.0, fmt="o", capsize=4, color=f"C{i}", label=find(row.method).title
        )
    settings = comparison.settings
    rows = "Held-out" if settings.validation else "Test"
    axes.set_xlabel("FLOPs per input, whole network (millions, 2 per multiply-add)")
    axes.set_ylabel(f"{rows} accuracy (%)")
    axes.set_title(f"{settings.dataset}: {len(settings.seeds)} seeds, {settings.active:.0%} active")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
