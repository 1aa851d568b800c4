"""Accuracy against budget: one set of weights, served at many active fractions."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from midl.adaptation import refresh_normalization
from midl.adaptation.measure import dense_outputs
from midl.analysis import count_flops
from midl.budget import set_active
from midl.errors import MIDLError
from midl.lab.data import Dataset, rows_for_all
from midl.lab.files import write_bytes
from midl.lab.measure import measure_accuracy, measure_latency

__all__ = ["Point", "measure_curve", "plot_curve"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A model at one budget.

    Args:
        active: fraction of groups, as set in every MID-L layer.
        accuracy: on the test rows, in percent.
        flops: of the whole model per input.
        flops_ratio: FLOPs of the dense model divided by ``flops``.
        latency: batch size to median seconds.
        latency_dense: likewise, of the dense model, timed in turn with this one.
    """

    active: float
    accuracy: float
    flops: int
    flops_ratio: float
    latency: dict[int, float]
    latency_dense: dict[int, float]


def measure_curve(
    model: nn.Module,
    dense: nn.Module,
    dataset: Dataset,
    budgets: Sequence[float] = (0.25, 0.4, 0.55, 0.75, 1.0),
    batches: Sequence[int] = (1, 64),
    on_point: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Return a point per budget; batch normalisations are refreshed for each. The model is left as it was.

    Args:
        model: with MID-L layers.
        dense: the model that it came from.
        dataset: to score on.
        budgets: active fractions, each in (0, 1].
        batches: batch sizes to time.
        on_point: called with each point as it is measured.

    Raises:
        MIDLError: no budgets, one out of range, or a model without MID-L layers.
    """
    if not budgets:
        raise MIDLError("measure_curve: budgets is empty, expected active fractions in (0, 1]")
    model = copy.deepcopy(model)
    rows = {batch: dataset.batch(dataset.test, slice(0, batch))[0] for batch in {1, *batches}}
    known = [dataset.batch(dataset.train, part)[0] for part in rows_for_all(dataset.train.y, 2048).split(256)]
    outputs = dense_outputs(dense, known)
    points = []
    for active in budgets:
        set_active(model, active)
        refresh_normalization(model, known, known, outputs)
        times = {batch: measure_latency({"model": model, "dense": dense}, rows[batch]) for batch in batches}
        flops = count_flops(model, rows[1])
        point = Point(
            active, measure_accuracy(model, dataset)[0], flops, count_flops(dense, rows[1]) / flops,
            {batch: found["model"]["median"] for batch, found in times.items()},
            {batch: found["dense"]["median"] for batch, found in times.items()},
        )  # fmt: skip
        points.append(point)
        on_point(point)
    return points


def plot_curve(points: Sequence[Point], dense_accuracy: float, title: str, path: Path) -> None:
    """Draw accuracy against FLOPs per input, with the dense network as a line, into a PNG file."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p.flops / 1e6 for p in points], [p.accuracy for p in points], "o-", label="one MID-L model")
    for p in points:
        axes.annotate(f"{p.active:.0%}", (p.flops / 1e6, p.accuracy), textcoords="offset points", xytext=(4, -12))
    axes.axhline(dense_accuracy, color="0.4", linestyle="--", label="dense")
    axes.set_xlabel("FLOPs per input, whole network (millions, 2 per multiply-add)")
    axes.set_ylabel("Test accuracy (%)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
