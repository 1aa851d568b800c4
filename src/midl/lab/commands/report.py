"""``midl report``: the results of a sweep as one HTML page and as Markdown."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from midl.lab.commands.errors import readable_errors

__all__ = ["report"]


def report(
    runs: Annotated[Path, typer.Argument(help="Folder of midl reproduce, or of midl runs --export.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown page whose part between the report's marks is replaced.")
    ] = None,
) -> None:
    """Write what a sweep shows of the paper's claims: verdicts, tables and charts.

    The page needs no network and holds everything: send it to somebody, open it on a phone.
    """
    from midl.lab.files import write_text
    from midl.lab.report import read_results, to_html, to_report_markdown, update_markdown

    with readable_errors():
        results = read_results(runs)
        command = f"midl report {shlex.quote(str(runs))}"
        write_text(out, to_html(results, command))
        typer.echo(f"{len(results.runs)} runs, profile {results.profile}: {out}")
        if markdown is not None:
            update_markdown(markdown, to_report_markdown(results, f"{command} --markdown {shlex.quote(str(markdown))}"))
            typer.echo(f"tables: {markdown}")
