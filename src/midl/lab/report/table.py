"""Table: cells with what they are sorted by, as Markdown; the page's template makes HTML of the same object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ["Cell", "Table", "to_markdown"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what is shown.
        value: what it is sorted by; ``None`` for the text.
        strong: bold; of differences, only where the interval excludes zero.
        kind: a CSS class, such as a verdict's.
    """

    text: str
    value: float | None = None
    strong: bool = False
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below column titles.

    Args:
        caption: one line above the table.
        columns: titles; the first column names the row.
        rows: each as long as ``columns``.
        numeric: whether all but the first column are numbers, aligned to the right.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numeric: bool = True


def to_markdown(table: Table) -> str:
    """Return the table as GitHub Markdown, without its caption.

    >>> print(to_markdown(Table("", ["method", "accuracy"], [[Cell("dense"), Cell("98.7", 98.7, strong=True)]])))
    | method | accuracy |
    |---|---:|
    | dense | **98.7** |
    """
    align = "---:" if table.numeric else "---"
    lines = [list(table.columns), ["---", *[align] * (len(table.columns) - 1)]]
    body = [
        [f"**{cell.text}**" if cell.strong else cell.text.replace("|", "\\|") for cell in row] for row in table.rows
    ]
    head = "| " + " | ".join(lines[0]) + " |"
    return "\n".join([head, "|" + "|".join(lines[1]) + "|", *("| " + " | ".join(cells) + " |" for cells in body)])
