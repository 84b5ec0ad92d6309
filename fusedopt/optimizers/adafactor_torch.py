"""What torch.optim.Adafactor calls the knobs and the states that Adafactor has with variant="torch"."""

from __future__ import annotations

from typing import Any

TORCHS_NAMES = {"beta2_decay": "decay_rate", "d": "clip_threshold"}
# What torch's equation has no knob for, and does.
_TORCHS_SWITCHES = {
    "scale_parameter": True,
    "relative_step": True,
    "warmup_init": False,
    "beta1": None,
    "compat": False,
}
# Ours by theirs, and which dimension of length 1 they keep.
_TORCHS_STATES: dict[str, tuple[str, int | None]] = {
    "exp_avg_sq_row": ("row_var", -1),
    "exp_avg_sq_col": ("col_var", -2),
    "exp_avg_sq": ("variance", None),
}


def renamed(group: dict[str, Any], variant: Any) -> dict[str, Any]:
    """A group with our names for torch's. Raises ValueError if they are not asked for."""
    found = {key: value for key, value in group.items() if key not in TORCHS_NAMES}
    for theirs, ours in TORCHS_NAMES.items():
        if theirs not in group:
            continue
        if variant != "torch":
            raise ValueError(
                f"{theirs}={group[theirs]!r} is a knob of torch's; pass variant='torch' with it, or {ours} instead"
            )
        found[ours] = group[theirs]
    return found


def check_switches(group: dict[str, Any]) -> None:
    """Raises ValueError if a group of variant="torch" has a knob that torch's equation does not have."""
    for name, value in _TORCHS_SWITCHES.items():
        if group[name] != value:
            raise ValueError(
                f"{name}={group[name]!r} is no knob of variant='torch'; leave it out, or use variant='transformers'"
            )


def is_torchs(group: dict[str, Any]) -> bool:
    """Whether torch's optimizer can step with what a group asks for; it folds no convolutions."""
    return group["variant"] == "torch" and not group["fold_conv"]


def torchs_group(group: dict[str, Any]) -> dict[str, Any]:
    """A group of a state dict with torch's names and without what only we have."""
    ours = {*_TORCHS_SWITCHES, *TORCHS_NAMES.values(), "variant", "fold_conv"}
    kept = {key: value for key, value in group.items() if key not in ours}
    return {**kept, **{theirs: group[key] for theirs, key in TORCHS_NAMES.items()}}


def torchs_state(held: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with torch's names and shapes."""
    found = {}
    for key, value in held.items():
        name, dim = _TORCHS_STATES.get(key, (key, None))
        found[name] = value if dim is None else value.unsqueeze(dim)
    return found
