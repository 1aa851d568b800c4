"""``midl curve``: accuracy, FLOPs and latency of one elastic network at many budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["curve"]


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected numbers separated by commas, such as 0.25,0.5,1") from None


def curve(
    dataset: Annotated[str, typer.Argument(help="Data set: digits needs no download; see midl info.")] = "digits",
    active: Annotated[str, typer.Option(help="Active fractions, separated by commas.")] = "0.25,0.4,0.55,0.75,1",
    budget: Annotated[
        float,
        typer.Option(help="FLOPs of the dense network, divided by those that light paths and gates are made for."),
    ] = 1.7,
    group_size: Annotated[int, typer.Option(help="Neurons that are selected together.")] = 16,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Dense network, as midl.save wrote it.  [default: train one]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Factory of the dense network, module:function.  [default: the data set's]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Training epochs of the dense network.  [default: the data set's]")
    ] = None,
    distil_epochs: Annotated[int, typer.Option(help="Epochs of elastic distillation.")] = 4,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for dense.safetensors, elastic.safetensors, curve.json, curve.png.")
    ] = Path("curve"),
    threads: Annotated[int | None, typer.Option(help="Threads.  [default: torch's]")] = None,
) -> None:
    """Make one network serve many budgets and print its accuracy, FLOPs and latency at each.

    The network is adapted once, every layer by the same ratio, so that it spends 1/BUDGET of dense's FLOPs at its own
    active fraction, then distilled with one drawn anew every step between the least and the most asked for.
    """
    from midl.lab.adapt_study.once import AdaptSettings, draw_curve

    with readable_errors():
        settings = AdaptSettings(
            dataset, budget, group_size=group_size, epochs=epochs, distil_epochs=distil_epochs, seed=seed,
            threads=threads, model=model,
        )  # fmt: skip
        for line in draw_curve(settings, _fractions(active), out, checkpoint):
            typer.echo(line)
