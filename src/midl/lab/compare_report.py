"""The comparison as a table: for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from midl.lab.compare import LATENCY_BATCHES, Comparison, Row
from midl.lab.files import write_json, write_text
from midl.lab.methods import find
from midl.lab.plots import plot_accuracy
from midl.lab.report.numbers import count, seconds

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["to_json", "to_markdown", "to_table", "write_report"]


def write_report(comparison: Comparison) -> None:
    """Write ``comparison.json``, ``table.md`` and ``accuracy.png`` into the run folder."""
    write_json(comparison.folder / "comparison.json", to_json(comparison))
    write_text(comparison.folder / "table.md", to_markdown(comparison))
    plot_accuracy(comparison, comparison.folder / "accuracy.png")


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return settings, recipes and rows as JSON values."""
    return {
        "settings": dataclasses.asdict(comparison.settings),
        "recipes": dataclasses.asdict(comparison.recipes),
        "rows": [
            dataclasses.asdict(row) | {"accuracy": row.accuracy, "spread": row.spread}
            for row in comparison.rows.values()
        ],
    }


def to_markdown(comparison: Comparison) -> str:
    """Return the table as GitHub Markdown, with the caption below."""
    header = ["", *_titles(comparison)]
    lines = [_line(header), "|---|" + "---:|" * (len(header) - 1), *(_line(cells) for cells in _body(comparison))]
    return "\n".join([*lines, "", caption(comparison)]) + "\n"


def to_table(comparison: Comparison) -> Table:
    """Return the table for a terminal of 80 columns or more."""
    from rich.table import Table

    table = Table(title=comparison.settings.dataset, caption=caption(comparison), caption_justify="left")
    table.add_column("", no_wrap=True)
    for title in _titles(comparison):
        table.add_column(title, justify="right", min_width=12)
    for cells in _body(comparison):
        table.add_row(*cells)
    return table


def caption(comparison: Comparison) -> str:
    """Return how to read the numbers."""
    s, recipes = comparison.settings, comparison.recipes
    seeds = f"mean ± standard deviation of {len(s.seeds)} seeds" if len(s.seeds) > 1 else "one seed"
    epochs = f"{recipes.train.epochs} epoch" + "s" * (recipes.train.epochs > 1)
    return (
        f"Accuracy: {seeds}. {s.active:.0%} active, groups of {s.group_size} neurons. FLOPs: two per multiply-add. "
        f"Latency: medians, and median ratios of interleaved pairs, weights cold. Backward: bytes that autograd keeps "
        f"per input in training. "
        f"Trained for {epochs}; the converted network: the dense one, distilled for "
        f"{recipes.distill.epochs} more."
    )


def _titles(comparison: Comparison) -> list[str]:
    return [find(method).title for method in comparison.rows]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _body(comparison: Comparison) -> list[list[str]]:
    """Return the table's rows: what is measured, then a cell per method."""
    rows, dense = list(comparison.rows.values()), comparison.rows["dense"]
    scored = "held-out acc. %" if comparison.settings.validation else "test accuracy %"

    def line(name: str, cell: Callable[[Row], str]) -> list[str]:
        return [name, *(cell(row) for row in rows)]

    lines = [
        line(scored, lambda r: f"{r.accuracy:.2f}" + ("" if r.spread is None else f" ± {r.spread:.2f}")),
        line("vs dense, points", lambda r: "" if r is dense else f"{r.accuracy - dense.accuracy:+.2f}"),
        line("active neurons", lambda r: f"{r.active_neurons:.0f} of {r.neurons}"),
        line("active %", lambda r: f"{100 * r.active_neurons / r.neurons:.1f}"),
        line("FLOPs per input", lambda r: count(r.flops)),
        line("fewer, network", lambda r: f"{dense.flops / r.flops:.2f}x"),
        line("fewer, hidden", lambda r: f"{dense.hidden_flops / r.hidden_flops:.2f}x"),
        line("parameters", lambda r: count(r.parameters)),
    ]
    for batch in LATENCY_BATCHES:
        lines += _latency_lines(line, batch)
    return [*lines, line("kept, backward", lambda r: f"{r.saved_bytes / 1024:.1f} KiB")]


def _latency_lines(line: Callable[[str, Callable[[Row], str]], list[str]], batch: int) -> list[list[str]]:
    return [
        line(f"latency batch {batch}", lambda r: seconds(r.latency[batch]["median"])),
        line("of dense", lambda r: f"{r.latency[batch]['ratio']:.2f}x"),
    ]
