"""Settings of Adafactor that are known to work."""

from __future__ import annotations

from typing import Any

from .. import checks
from .adafactor import Adafactor

_PRESETS: dict[str, dict[str, Any]] = {
    "t5": {"scale_parameter": True, "relative_step": True, "warmup_init": True},
    "external_lr": {
        "lr": 1e-3,
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "weight_decay": 0.0,
        "scale_parameter": False,
        "relative_step": False,
        "warmup_init": False,
    },
}


def recommended_adafactor(params: Any, preset: str = "t5", **overrides: Any) -> Adafactor:
    """Makes an Adafactor with settings that are known to work.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        preset: "t5", the relative learning rate with its warm-up, scaled by the parameters, as T5 is fine-tuned; or
            "external_lr", a plain learning rate of 1e-3, which a scheduler may drive.
        **overrides: Arguments of `Adafactor` that win over the preset's.

    Returns:
        The optimizer.

    Raises:
        ValueError: The preset is unknown, or an override does not go with it.
        TypeError: A keyword is unknown.
    """
    return Adafactor(params, **{**_PRESETS[checks.one_of("preset", preset, _PRESETS)], **overrides})
