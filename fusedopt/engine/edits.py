"""What is set in param groups between steps is checked like what is passed to a constructor."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from .. import checks
from .contract import Contract


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
                edited.append((index, group, optimizer.checked_group(optimizer.with_any_lr(complete))))
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
