"""The command line: ``fusedopt ...``. One module for each subcommand; `app` is the list of them."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Runs the command line, or says what it needs."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"the fusedopt command needs {error.name}; install it with: pip install 'fusedopt[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # bars and ticks are not in every locale
            stream.reconfigure(errors="replace")
    from .app import app

    app(prog_name="fusedopt")
