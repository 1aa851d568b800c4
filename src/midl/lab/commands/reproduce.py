"""``midl reproduce``: the paper's experiments as a queue of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["reproduce"]


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _integers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected integers separated by commas, such as 0,1,2") from None


def reproduce(
    data: Annotated[str | None, typer.Option(help="Data sets, commas between.  [default: the profile's]")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, commas between.  [default: the profile's]")] = None,
    seeds: Annotated[str | None, typer.Option(help="Random seeds, commas between.  [default: the profile's]")] = None,
    profile: Annotated[str, typer.Option(help="smoke: everything once, tiny. paper: the real thing.")] = "paper",
    out: Annotated[Path, typer.Option(help="Folder for the runs' folders.")] = Path("runs"),
    launcher: Annotated[str, typer.Option(help="Where workers run: local, or ray for a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(help="Runs side by side.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of each worker and of timings.  [default: torch's, divided among the workers]"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="no: float32. bf16: mixed precision. Default: as the profile has it.")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency when all runs are done.")] = True,
) -> None:
    """Train every method on every data set with every seed, and measure.

    Stop it at any time, even with kill -9: the same command goes on where it was. Several may run at once on the same
    folder. `midl runs` shows how things stand.
    """
    from midl.lab.processes import accelerator, end_process
    from midl.lab.reproduce.plan import Request
    from midl.lab.reproduce.sweep import Options, sweep

    with readable_errors("stopped; the same command goes on from the last finished epoch"):
        request = Request(profile, _names(data), _names(methods), _integers(seeds), precision)  # type: ignore[arg-type]
        options = Options(launcher, workers, threads, latency)
        found = sweep(request, out, options, lambda line: print(line, flush=True))
        if found is not None and (found.outcome.failed or found.outcome.blocked):
            failed, blocked = len(found.outcome.failed), len(found.outcome.blocked)
            typer.echo(f"midl: {failed} failed, {blocked} need them: midl runs {out}", err=True)
            raise typer.Exit(1)
        end_process(accelerator())
