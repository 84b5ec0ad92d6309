"""A drop-in takes by position what the original takes there."""

from __future__ import annotations

import inspect
import re

import pytest
from cases import peer

import fusedopt

DROP_INS = {
    original: cls
    for cls in (getattr(fusedopt, name) for name in fusedopt.__all__)
    if inspect.isclass(cls)
    for original in re.findall(r"drop-in for `(\w+(?:\.\w+)+)`", cls.__doc__ or "")
}


def positions(cls: type) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("original", DROP_INS)
def test_arguments_have_the_places_of_the_original(original: str) -> None:
    module, _, name = original.rpartition(".")
    try:
        theirs = positions(getattr(peer(module), name))
    except Exception as error:  # transformers imports it now, and may need a newer torch
        pytest.skip(f"{original} does not load: {error}")
    ours = positions(DROP_INS[original])
    assert len(DROP_INS) >= 9
    assert ours[: len(theirs)] == theirs[: len(ours)]
    following = theirs[len(ours) :][:1]  # beyond an argument that there is not here, there are no places
    assert not set(following) & set(inspect.signature(DROP_INS[original]).parameters), "it is taken by keyword only"


def test_a_name_is_a_string() -> None:
    params = [fusedopt]  # not looked at
    for name in (None, 5, fusedopt.AdamW, b"adamw"):
        with pytest.raises(TypeError, match=r"name=.*; pass one of optimizer_names\(\)"):
            fusedopt.create_optimizer(name, params)
    with pytest.raises(ValueError, match="'AdamW_8bit' is not known; did you mean 'adamw_8bit'"):
        fusedopt.create_optimizer("AdamW_8bit", params)
