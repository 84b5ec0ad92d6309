"""Runs the benchmarks against the installed package.

`python -m bench` would put the repository first on the path, and with it the sources of fusedopt, which
have no compiled core. Here the repository comes last.
"""

import sys
from pathlib import Path

sys.path[0:1] = []
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.__main__ import main  # noqa: E402

if __name__ == "__main__":
    main()
