"""``midl bench``: how fast the layers are here, against nn.Linear and the best dense kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["bench"]


def bench(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's name or a pattern; commas separate several.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A short list with few rounds, under a minute.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write JSON here, after every case.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads.  [default: torch's]")] = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option(help="Implementation to time, repeatable; 'all' adds every one.  [default: auto]"),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile among the baselines.")] = True,
    render: Annotated[
        Path | None, typer.Option(help="Make the page and plots from the JSON files of this folder and stop.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    page: Annotated[Path, typer.Option(help="With --render: the page.")] = Path("docs/benchmarks.md"),
) -> None:
    """Time the layers against nn.Linear, nn.Conv2d, torch.topk and the best dense kernel, interleaved.

    Parity with the reference comes first: a contender that fails tells no speed, and the exit code is then 1.
    """
    from rich.console import Console

    from midl.errors import MIDLError
    from midl.lab.bench.runner import list_benchmarks, run_bench

    with readable_errors("stopped; the JSON file holds the cases that were finished"):
        if device not in ("cpu", "cuda"):
            raise MIDLError(f"bench: device={device!r}, expected 'cpu' or 'cuda'")
        if device == "cuda":
            from midl.lab.bench_cuda import render_cuda, run_cuda_bench

            typer.echo(render_cuda(run_cuda_bench(out=out, quick=quick)))
            return
        if list_cases:
            print("\n".join(list_benchmarks(only, quick=quick)))
            return
        if render is not None:
            from midl.lab.bench.render import render as make

            for path in make(sorted(render.glob("*.json")), page):
                typer.echo(path)
            return
        from midl.lab.bench.console import Printer

        console = Console()
        # A file or a pipe has no width of its own; 80 columns would cut the tables.
        printer = Printer(console if console.is_terminal else Console(width=160))
        results = run_bench(
            only, quick=quick, out=out, threads=threads, kernels=kernels or ["auto"], compile=compiled, report=printer
        )
        printer.finish(results)
        if results.refused:
            raise typer.Exit(1)
