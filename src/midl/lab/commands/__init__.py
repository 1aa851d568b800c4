"""The commands of the command line: one module and one function each, which imports what it needs when it runs."""

import typer

from midl.lab.commands.adapt import adapt
from midl.lab.commands.bench import bench
from midl.lab.commands.compare import compare
from midl.lab.commands.curve import curve
from midl.lab.commands.info import info
from midl.lab.commands.report import report
from midl.lab.commands.reproduce import reproduce
from midl.lab.commands.runs import runs

__all__ = ["app"]

app = typer.Typer(
    help="MID-L: layers that spend full computation only on the neurons an input needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(adapt)
app.command()(bench)
app.command()(compare)
app.command()(curve)
app.command()(info)
app.command()(report)
app.command()(reproduce)
app.command()(runs)
