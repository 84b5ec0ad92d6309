"""Lists what the package and one of its extras require, one to a line: `python tools/requirements.py dev`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def required(extra: str) -> Iterator[str]:
    """An extra's requirements; where it names other extras of the package, theirs."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        of_itself = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", requirement)
        if of_itself is None:
            yield requirement
        else:
            for other in of_itself[1].split(","):
                yield from required(other)


print(*PROJECT["dependencies"], *required(sys.argv[1]), sep="\n")
