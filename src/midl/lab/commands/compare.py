"""``midl compare``: dense and MID-L trained side by side, one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["compare"]


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected integers separated by commas, such as 0,1,2") from None


def compare(
    dataset: Annotated[str, typer.Argument(help="Data set: digits needs no download; see midl info.")] = "digits",
    seeds: Annotated[
        str, typer.Option(help="Random seeds, separated by commas; one run of every method each.")
    ] = "0,1,2",
    epochs: Annotated[int | None, typer.Option(help="Training epochs.  [default: the data set's]")] = None,
    active: Annotated[float, typer.Option(help="Fraction of the neuron groups that take the full path.")] = 0.45,
    group_size: Annotated[
        int | None, typer.Option(help="Neurons selected together.  [default: the data set's]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for run folders.")] = Path("runs"),
    threads: Annotated[int | None, typer.Option(help="Threads.  [default: torch's; 1 for small networks]")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="Score on held-out training rows.")] = False,
) -> None:
    """Train dense, narrowed dense, MID-L from scratch and converted MID-L with the same recipe and seeds.

    Prints one table and writes a run folder. Stop it at any time: the same command goes on where it was.
    """
    from rich.console import Console

    from midl.lab.compare import Settings
    from midl.lab.compare import compare as run
    from midl.lab.compare_report import to_table, write_report
    from midl.lab.progress import ProgressBars

    with readable_errors("stopped; the same command goes on from the last finished epoch"):
        settings = Settings(
            dataset=dataset, seeds=_integers(seeds), epochs=epochs, active=active, group_size=group_size,
            threads=threads, validation=validation,
        )  # fmt: skip
        console = Console()
        with ProgressBars(settings.seeds) as bars:
            comparison = run(settings, out, bars)
        write_report(comparison)
        console.print(to_table(comparison))
        _print_path(console, comparison.folder)


def _print_path(console: Any, folder: Path) -> None:
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
