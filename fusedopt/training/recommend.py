"""`recommend`: of all ways to keep a training's state, those that fit into the memory there is."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import checks
from ..engine.optimizer import CLASSES
from . import files
from .estimate import Estimate, estimate, takes_offload
from .evaluate import size
from .presets import preset
from .recipe import Recipe

RESERVE_BYTES = 2**30  # what CUDA, libraries and fragments take, measured nowhere: a margin
_BEST = 3
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Recommendation:
    """A way to train, and what it takes.

    Attributes:
        recipe: The recipe.
        estimate: Its memory on a device.
        spare: Bytes that are left on a device, beside the reserve; below 0 if it does not fit. Where `estimate` knows
            no activations, they have to go there.
        reasons: Why it is what it is, the main one first.
    """

    recipe: Recipe
    estimate: Estimate
    spare: int
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return self.spare >= 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        values = {"recipe": self.recipe.to_dict(), "estimate": self.estimate.to_dict(), "spare": self.spare}
        return {**values, "fits": self.fits, "reasons": list(self.reasons)}

    def __str__(self) -> str:
        told = f"leaves {size(self.spare)}" if self.fits else f"lacks {size(-self.spare)}"
        known = "" if self.estimate.activations is not None else " without activations"
        head = f"{self.recipe.optimizer}: {size(self.estimate.total)} of device memory{known}, {told}"
        moved = f"a step moves {size(self.estimate.moved)} on the device"
        if self.estimate.transferred:
            moved += f" and {size(self.estimate.transferred)} between host and device"
        return "\n  ".join([head, *self.reasons, moved])


def memory_bytes(value: int | str) -> int:
    """Bytes, given as a number or as text.

    Args:
        value: Bytes, or such as "24GB" (10^9 bytes each) or "80GiB" (2^30).

    Returns:
        Bytes.

    Raises:
        ValueError: It is no size.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", value.upper())
        if match is None:
            raise ValueError(f"memory {value!r} is no size; write for example 24GB or 80GiB")
        value = int(float(match[1]) * _UNITS[match[2]])
    return checks.whole("memory", value)


def recommend(
    model: nn.Module | str,
    memory: int | str,
    *,
    devices: int = 1,
    task: str | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
) -> list[Recommendation]:
    """Finds recipes that fit, the best quality first.

    Tried are float32 and bfloat16 weights, states of 32 and 8 bits, AdamW, Lion and Adafactor
    (training/candidates.yaml), each with whole gradients, with released ones, and with states in the host's memory
    where the optimizer can and parameters are not sharded. `estimate` is the judge, with activations checkpointed and
    the largest micro-batch that fits and divides the batch; gradients are accumulated to the batch that is wanted. Of a
    model whose activations are not known (`Estimate.activations`), micro-batches are of one sequence, and reasons say
    so.

    Args:
        model: As for `estimate`. A module must be kept in one dtype, float32 or bfloat16; only candidates with that
            dtype are tried.
        memory: Of each device: bytes, or such as "24GB". 1 GiB of it is kept in reserve.
        devices: How many there are. From two on, FSDP2 shards everything.
        task: The preset that all else is from; the small one's by default, which assumes nothing.
        batch_size: Sequences in a step, on all devices; the preset's by default.
        sequence_length: Tokens in a sequence; the preset's by default, else 1,024.

    Returns:
        The best three that fit, no two with the same optimizer and formats; if none fits, the one that lacks least.

    Raises:
        ValueError: A number is out of range, a name is unknown, or no candidate goes with the module.
    """
    available = memory_bytes(memory) - RESERVE_BYTES
    devices = checks.count("devices", devices)
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None:
            checks.count(name, value)
    base = Recipe() if task is None else preset(task)
    length = sequence_length or base.sequence_length or 1024
    batch = batch_size or base.per_device_train_batch_size * base.gradient_accumulation_steps * devices
    base = dataclasses.replace(base, sequence_length=length, gradient_checkpointing=True)
    found: list[Recommendation] = []
    nearest: Recommendation | None = None
    for fields, reasons, is_new in _candidates(base, devices):
        if is_new and len(found) == _BEST:
            break
        recipe = _with(base, fields)
        if isinstance(model, nn.Module) and not _goes_with(recipe, model):
            continue
        if found and found[-1].reasons[0] == reasons[0]:
            continue  # it fits already, at less cost
        advice = _largest_batch(model, recipe, available, devices, batch, reasons)
        if advice.fits:
            found.append(advice)
        elif nearest is None or advice.spare > nearest.spare:
            nearest = advice
    if not found and nearest is None:
        assert isinstance(model, nn.Module)  # of a size, every candidate is tried
        raise ValueError(_why_none_goes_with(base, model))
    return found[:_BEST] or ([nearest] if nearest is not None else [])


def _candidates(base: Recipe, devices: int) -> Iterator[tuple[dict[str, Any], tuple[str, ...], bool]]:
    """Fields, reasons, and whether it is the first way of a candidate."""
    listed: Any = files.read(Path(__file__).with_name("candidates.yaml"))
    for candidate in listed:
        fields = candidate["fields"]
        reason = f"{candidate['name']}: {candidate['why']}"
        yield fields, (reason,), True
        # Sums over shards need all ranks at one time, and released gradients come to each in its own order.
        is_released = devices == 1 or not CLASSES[fields["optimizer"]].takes_sums
        if base.loss_scaling is None and is_released:
            released = {**fields, "release_gradients": True}
            yield released, (reason, "gradients are stepped and freed as they come, so they are not accumulated"), False
        # States of shards are where the shards are.
        if devices == 1 and takes_offload(fields["optimizer"]):
            options = {**fields.get("options", {}), "state_device": "cpu"}
            yield {**fields, "options": options}, (reason, "state is in the host's memory, and streams by"), False


def _with(base: Recipe, fields: dict[str, Any]) -> Recipe:
    changes = dict(fields)
    cls = CLASSES[fields["optimizer"]]
    takes = inspect.signature(cls).parameters
    if "betas" in takes and base.betas is not None and len(takes["betas"].default) == len(base.betas):
        changes["betas"] = base.betas
    if base.eps is not None and "eps" in takes and isinstance(takes["eps"].default, float):
        changes["eps"] = base.eps
    if cls.USUAL_LR[1] < CLASSES[base.optimizer].USUAL_LR[1] and base.lr is not None and cls.USUAL_LR_NOTE:
        changes.update(lr=base.lr / 5, weight_decay=(base.weight_decay or 0.0) * 5)
    if changes["precision"] != "float16":
        changes["loss_scaling"] = None
    if changes.get("release_gradients"):
        changes["max_grad_norm"] = base.max_grad_norm
    return base.replaced(**{"options": {}, "release_gradients": False, **changes})


def _goes_with(recipe: Recipe, model: nn.Module) -> bool:
    try:
        recipe.check_model(model)
    except ValueError:
        return False
    return True


def _why_none_goes_with(base: Recipe, model: nn.Module) -> str:
    """Why no candidate is for a module, as a sentence."""
    kept = sorted({str(param.dtype) for param in model.parameters() if param.requires_grad})
    tried = sorted({f"torch.{fields['weights_dtype']}" for fields, _, _ in _candidates(base, 1)})
    if len(kept) == 1 and kept[0] in tried:
        try:
            base.replaced(weights_dtype=kept[0].removeprefix("torch.")).check_model(model)
        except ValueError as error:
            return str(error)
    return (
        f"model has trainable weights in {' and '.join(kept) or 'no dtype'}, and what is tried has all of them in "
        f"{' or in '.join(tried)}; call model.bfloat16() or model.float()"
    )


def _largest_batch(
    model: nn.Module | str, recipe: Recipe, available: int, devices: int, batch: int, reasons: tuple[str, ...]
) -> Recommendation:
    """With the largest micro-batch that fits; else with 1, and so if activations are not known."""
    per_device = max(1, -(-batch // devices))
    one = estimate(model, dataclasses.replace(recipe, per_device_train_batch_size=1), devices=devices)
    most = 1
    if one.activations is not None:
        most = min(per_device, max(1, 1 + (available - one.total) // max(1, one.activations)))
    less = ""
    if recipe.release_gradients:
        micro, steps = most, 1
        less = "" if micro >= per_device else f", fewer than the {per_device} that are wanted"
    else:
        micro = max(each for each in range(1, most + 1) if per_device % each == 0)
        steps = per_device // micro
    recipe = dataclasses.replace(recipe, per_device_train_batch_size=micro, gradient_accumulation_steps=steps)
    found = dataclasses.replace(one, activations=None if one.activations is None else one.activations * micro)
    told = f"{steps} x {micro} sequences of {recipe.sequence_length} tokens for each device{less}, blocks checkpointed"
    if one.activations is None:
        reasons = (*reasons, "activations of this model are not known: they have to go into what is left")
    return Recommendation(recipe, found, available - found.total, (*reasons, told))
