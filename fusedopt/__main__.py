"""The command line as ``python -m fusedopt``."""

from .cli import main

main()
