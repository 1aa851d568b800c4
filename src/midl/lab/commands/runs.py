"""``midl runs``: how the runs of a sweep stand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from midl.lab.commands.errors import readable_errors

if TYPE_CHECKING:
    from midl.lab.reproduce.state import State

__all__ = ["runs"]


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that midl reproduce wrote to.")] = Path("runs"),
    export: Annotated[Path | None, typer.Option(help="Add the finished runs to the compact JSON here.")] = None,
) -> None:
    """Show which runs are done, running, failed, stopped or waiting."""
    from rich.console import Console
    from rich.table import Table

    from midl.lab.reproduce.export import export as write
    from midl.lab.reproduce.listing import list_runs

    with readable_errors():
        if export is not None:
            for file in write(folder, export):
                typer.echo(file)
            return
        states = list_runs(folder)
    table = Table(box=None, pad_edge=False)
    for column in ("data set", "method", "seed", "rows", "noise", "state", "accuracy"):
        table.add_column(column, justify="right" if column in ("seed", "rows", "noise", "accuracy") else "left")
    for state in states:
        table.add_row(*_cells(state))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own; 80 columns would break lines
        console = Console(width=200)
    console.print(table)
    counts = {name: sum(state.state == name for state in states) for name in dict.fromkeys(s.state for s in states)}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()), highlight=False)


def _cells(state: State) -> list[str]:
    spec, tuning = state.spec, state.kind == "tuning"
    text: str = state.state
    if text in ("running", "stopped") and state.epochs:
        text += f" after epoch {state.epochs} of {spec['recipe']['epochs']}"
    elif text == "failed":
        text += f": {state.reason}"
    accuracy = f"{state.finished['accuracy']:.2f}" if state.finished is not None and not tuning else ""
    return [
        spec["dataset"],
        spec["method"] + (" tuning" if tuning else ""),
        "" if tuning else str(spec["seed"]),
        "" if tuning else f"{100 * spec['train_fraction']:g} %",
        "" if tuning else f"{100 * spec['label_noise']:g} %",
        text,
        accuracy,
    ]
