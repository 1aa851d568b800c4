"""The console command ``midl``; its commands are the modules of :mod:`midl.lab.commands`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without the extra ``lab`` say how to install it."""
    try:
        from midl.lab.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "midl":
            raise
        print(f"midl: {error.name} is not installed, expected the extra lab: pip install 'midl[lab]'", file=sys.stderr)
        raise SystemExit(1) from None
    app()
