"""Recipes to begin with: one file each, in which comments say where the numbers are from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import checks
from .recipe import Recipe

_FOLDER = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Preset:
    """A recipe with its reasons.

    Attributes:
        name: Of the preset.
        text: The file: YAML whose comments say why.
    """

    name: str
    text: str

    @property
    def summary(self) -> str:
        """What it is for, in a line."""
        return self.text.partition("\n")[0].removeprefix("# ")

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return Recipe.from_text(self.text)


def presets() -> dict[str, Preset]:
    """All presets by name."""
    return {path.stem: Preset(path.stem, path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))}


def find_preset(name: str) -> Preset:
    """A preset with its reasons. Raises a ValueError that lists all if there is none of that name."""
    known = presets()
    if name not in known:
        raise ValueError(
            f"preset {name!r} is not known{checks.closest(str(name), known)}; there are {', '.join(known)}"
        )
    return known[name]


def preset(name: str) -> Recipe:
    """The recipe of a preset.

    Args:
        name: One of `presets()`.

    Returns:
        The recipe; `replaced` changes it.

    Raises:
        ValueError: There is no such preset.
    """
    return find_preset(name).recipe
