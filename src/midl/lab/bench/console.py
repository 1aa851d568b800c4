"""The benchmark tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from midl.lab.bench.machine import busy_machine
from midl.lab.bench.registry import Case
from midl.lab.bench.results import Results, Row
from midl.lab.bench.summary import format_ratio, format_roofline, format_seconds, summarise

__all__ = ["Printer"]


class Printer:
    """Prints the header before the first case, each case as it ends and the summary: ``run_bench``'s ``report``."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, False

    def __call__(self, results: Results, case: Case, rows: list[Row]) -> None:
        """Print a case."""
        if not self._started:
            _print_header(results, self._console)
            self._started = True
        _print_case(case, rows, self._console)

    def finish(self, results: Results) -> None:
        """Print the geometric means."""
        _print_summary(results, self._console)


def _print_header(results: Results, console: Console) -> None:
    """Print machine and ceilings."""
    machine, ceilings = results.machine, results.ceilings
    caches = ", ".join(f"{name} {size // 1024} KiB" for name, size in machine["caches"].items())
    console.print(
        f"{machine['cpu']}, {machine['capability']}, {machine['threads']} of {machine['cores']} cores; {caches}\n"
        f"torch {machine['torch']}, midl {machine['midl']} at {machine['commit']}; {machine['date']}, "
        f"load {machine['load_average']}"
    )
    busy = busy_machine(machine)
    if busy:
        console.print(busy, soft_wrap=True)
    fma = ceilings["fma_gflops"]
    console.print(
        f"ceilings: {'no C compiler' if fma is None else f'{fma:.0f}'} GFLOP/s fp32 multiply-add, "
        f"{ceilings['gemm_gflops']:.0f} fp32 GEMM, {ceilings['gemm_bf16_gflops']:.0f} bf16 GEMM; "
        f"read {ceilings['read_gbs']:.1f} GB/s ({ceilings['read_by']})"
    )


def _print_case(case: Case, rows: list[Row], console: Console) -> None:
    """Print the rows of one case; a row whose parity check is red tells no speed."""
    console.print(f"[bold]{case.name}[/bold]")
    timed = next((row for row in rows if row.times), None)
    if timed is not None:
        dense = {name: spread for name, spread in timed.times.items() if name != timed.contender}
        times = (f"{name} {format_seconds(s['median'])}{' (best)' * (name == timed.best)}" for name, s in dense.items())
        console.print("  " + ", ".join(times), soft_wrap=True)
    for name, reason in (rows[0].left_out if rows else {}).items():
        console.print(f"  left out: {name}: {reason}", markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=timed is not None)
    for column in ("", "contender", "kernel", "time", "over user", "over best", "roofline", "parity"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row("", *_cells(row))
    console.print(table)
    console.print()


def _cells(row: Row) -> list[str]:
    error = f"{row.parity['error']:.0e}"
    start = [row.contender, row.implementation]
    if row.refused:
        return [*start, "REFUSED", "", "", "", f"{error} > {row.parity['limit']:.0e} {row.parity['detail']}"]
    if row.memory is not None:
        ours, dense = row.memory[row.contender], row.memory[row.user]
        saved, peak = (f"{name} {_mib(ours[name])}, dense {_mib(dense[name])}" for name in ("saved", "peak"))
        return [*start, saved, peak, "", "", error]
    time = format_seconds(row.times[row.contender]["median"])
    return [*start, time, format_ratio(row.over_user), format_ratio(row.over_best), format_roofline(row), error]


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.2f} MiB"


def _print_summary(results: Results, console: Console) -> None:
    """Print geometric means and worst cells per group and contender."""
    console.print("[bold]geometric means, baseline time / ours[/bold]")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("group", "contender", "cells", "over user", "over best", "worst", "in", "refused"):
        table.add_column(column, no_wrap=True)
    for s in summarise(results.rows):
        ratios = [
            f"{ratio:.2f}" if ratio is not None else "" for ratio in (s.over_user, s.over_best, s.worst_over_best)
        ]
        table.add_row(s.group, s.contender, str(s.cells), *ratios, s.worst_case, str(s.refused or ""))
    console.print(table)
    console.print(f"{100 * results.preempted:.0f} % of our calls were preempted by other processes")
    if results.refused:
        console.print(f"rows whose output differs from the reference's and that tell no speed: {len(results.refused)}")
