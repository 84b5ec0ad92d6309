"""What is set in param groups between steps is checked like what is passed to a constructor."""

from __future__ import annotations

import contextlib
from operator import itemgetter
from typing import Any

from .. import checks
from ..storage import masters
from ..storage.state import EIGHT_BIT, stored_format
from .contract import Contract

# What says how states and weights are kept. States that are there already are not made anew for it.
_FORMATS = ("state_dtype", "min_quantized_numel", "master_weights")


class Edits:
    """Notices options of param groups that have changed since they were last checked.

    The learning rate is left to the step, which reads it anyway: schedulers set it in every step, and some to what no
    constructor takes. What an optimizer counts in its groups is its own.
    """

    def __init__(self, optimizer: Contract) -> None:
        own = {"lr", *optimizer.own_defaults()}
        self._keys = [key for key in optimizer.defaults if key not in own]
        self._read = itemgetter(*self._keys)
        self._checked: dict[int, tuple[Any, ...]] = {}  # values of these keys, by the group's index

    def settle(self, optimizer: Contract) -> None:
        """See `settle`."""
        edited = []
        for index, group in enumerate(optimizer.param_groups):
            if not self._is_checked(index, group):
                complete = {**optimizer.defaults, **group}
                checked = optimizer.checked_group(optimizer.with_any_lr(complete))
                before = self._checked.get(index)
                if before is not None:
                    _check_stored(optimizer, index, dict(zip(self._keys, before)), checked)
                edited.append((index, group, checked))
        for index, group, checked in edited:  # only after all of them were found to be good
            for key, value in optimizer.defaults.items():
                group.setdefault(key, value)
            group.update(zip(self._keys, self._read(checked)))
            if not isinstance(group["params"], list):
                group["params"] = list(group["params"])
            # Copies of what may be written to, such as a list of betas.
            values = self._read(checked)
            self._checked[index] = tuple(checks.plain(v) if isinstance(v, (list, dict)) else v for v in values)

    def _is_checked(self, index: int, group: dict[str, Any]) -> bool:
        try:
            return bool(self._read(group) == self._checked.get(index)) and isinstance(group["params"], list)
        except (KeyError, RuntimeError, ValueError):  # an option is missing, or is an array and not one number
            return False


def _check_stored(optimizer: Contract, index: int, before: dict[str, Any], group: dict[str, Any]) -> None:
    """Raises ValueError if options ask for other formats than those that a group's states were made in."""
    changed = [key for key in _FORMATS if before[key] != group[key]]
    for position, param in enumerate(group["params"] if changed else ()):
        held = optimizer.state.get(param, {})
        where = f"parameter {position} of group {index}, of shape {tuple(param.shape)},"
        kept = [key for key in masters.KEYS.values() if key in held]
        wanted = masters.KEYS.get(masters.kind_of(group["master_weights"], param) or "")
        if "master_weights" in changed and kept and wanted not in kept:
            raise ValueError(
                f"master_weights={group['master_weights']!r} was set in group {index}, but {where} keeps {kept[0]!r} "
                f"of master_weights={before['master_weights']!r} beside it, a part of its weights; take the weights "
                "with fp32_parameters before setting it, and give them back with load_fp32_parameters after it"
            )
        for spec in optimizer.states_of(group, param):
            keys = spec.keys_in(held)
            stored = stored_format(spec, group, param)
            found = EIGHT_BIT if len(keys) > 1 else str(held[keys[0]].dtype).removeprefix("torch.") if keys else stored
            if found != stored and isinstance(stored, str):
                raise ValueError(
                    f"{changed[0]}={group[changed[0]]!r} was set in group {index}, but {where} has its state "
                    f"{spec.name!r} in {found} already; call optimizer.load_state_dict(optimizer.state_dict()) to "
                    "convert what there is"
                )


def settle(optimizer: Contract) -> None:
    """Checks the options that were set in param groups since the last step, and brings them into their usual form.

    Options that a group lacks are filled in from the defaults, and its parameters become a list.

    Raises:
        ValueError: An option is out of range. Nothing has changed then.
        TypeError: An option is of the wrong type.
    """
    if "_edits" not in optimizer.__dict__:  # copies and pickles of an optimizer make their own
        optimizer.__dict__["_edits"] = Edits(optimizer)
    optimizer.__dict__["_edits"].settle(optimizer)


def begin_anew(optimizer: Contract) -> None:
    """Notes the options of an optimizer whose states and groups were just set, for its next step to compare with."""
    optimizer.__dict__.pop("_edits", None)
    with contextlib.suppress(ValueError, TypeError):  # what no step can be taken with, the next one refuses
        settle(optimizer)
