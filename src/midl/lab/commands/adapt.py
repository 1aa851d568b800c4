"""``midl adapt``: a trained network to a budget, with its report, accuracy, latency and a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["adapt"]


def adapt(
    dataset: Annotated[str, typer.Argument(help="Data set: digits needs no download; see midl info.")] = "digits",
    budget: Annotated[
        float, typer.Option(help="FLOPs, or time, of the dense network, divided by those of the result.")
    ] = 1.7,
    latency_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs per call for which the budget is one of time.  [default: it counts FLOPs]"),
    ] = None,
    max_active: Annotated[
        float | None, typer.Option(help="Largest share of the neurons that may be active.  [default: no limit]")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Neurons that are selected together.")] = 16,
    threshold: Annotated[
        bool,
        typer.Option("--threshold", help="Let every input take as many groups as it needs, the budget on average."),
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Dense network, as midl.save wrote it.  [default: train one]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Factory of the dense network, module:function.  [default: the data set's]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Training epochs of the dense network.  [default: the data set's]")
    ] = None,
    distil_epochs: Annotated[int, typer.Option(help="Epochs of distillation; 0: none.")] = 1,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for dense.safetensors, adapted.safetensors, report.json, accuracy.png.")
    ] = Path("adapted"),
    threads: Annotated[int | None, typer.Option(help="Threads.  [default: torch's]")] = None,
) -> None:
    """Adapt a network to a budget; print what happened to every layer, accuracy and latency; save the result.

    The network is the data set's of ``midl compare``, or what ``--model`` makes, trained here or loaded.
    """
    from midl.lab.adapt_study.once import AdaptSettings, adapt_once

    with readable_errors():
        settings = AdaptSettings(
            dataset, budget, group_size, epochs, distil_epochs, seed, threads, model, latency_batch, threshold,
            max_active,
        )  # fmt: skip
        for line in adapt_once(settings, out, checkpoint):
            typer.echo(line)
