"""How commands end when something goes wrong: one line on standard error and an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from midl.errors import MIDLError

__all__ = ["readable_errors"]


@contextmanager
def readable_errors(interrupted: str = "stopped") -> Iterator[None]:
    """Turn midl's errors and the system's into exit code 1 and Ctrl-C into 130, each with one line.

    Other errors are bugs and pass.

    Args:
        interrupted: what to say after Ctrl-C.
    """
    try:
        yield
    except (MIDLError, OSError) as error:
        typer.echo(f"midl: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"midl: {interrupted}", err=True)
        raise typer.Exit(130) from None
