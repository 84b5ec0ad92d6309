"""Diagnosis: from what was measured of a training that has gone wrong to remedies, the first the most likely."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..schedules import scheduler_names
from .changes import NOTHING, Diff
from .diagnose_memory import OutOfMemory, parse_out_of_memory
from .diagnose_profile import Profile
from .monitor_runs import Run
from .recipe import Recipe
from .validate import check_construction

TROUBLES = ("unstable", "out of memory", "slow convergence", "overfitting", "slow steps")

_UNSTABLE = ("non_finite", "overflow", "loss_spike", "divergence", "exploding_gradients", "update_spike", "oscillation")
_SLOW = ("plateau", "stuck_weights", "zero_lr", "vanishing_gradients", "dead_parameters")


@dataclass(frozen=True)
class Remedy:
    """Something to do.

    Attributes:
        what: A sentence.
        change: The same as changes of the recipe; empty if it is none of the recipe's.
    """

    what: str
    change: Diff = NOTHING

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"what": self.what, "change": [change.to_dict() for change in self.change]}


@dataclass(frozen=True)
class Diagnosis:
    """One trouble.

    Attributes:
        trouble: One of TROUBLES.
        evidence: What was measured, as sentences.
        remedies: What to do, the most likely first; each is meant alone, against the recipe as it is.
    """

    trouble: str
    evidence: tuple[str, ...]
    remedies: tuple[Remedy, ...]

    def __str__(self) -> str:
        lines = [self.trouble, *(f"  found: {each}" for each in self.evidence)]
        for i, remedy in enumerate(self.remedies, 1):
            lines.append(f"  {i}. {remedy.what}")
            lines += [f"       {change}" for change in remedy.change]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "trouble": self.trouble,
            "evidence": list(self.evidence),
            "remedies": [remedy.to_dict() for remedy in self.remedies],
        }


def diagnose(
    run: Run | None = None,
    recipe: Recipe | None = None,
    *,
    error: str | BaseException | None = None,
    profile: Profile | None = None,
) -> list[Diagnosis]:
    """Finds what is wrong with a training and what to do about it.

    Args:
        run: What a Monitor has recorded.
        recipe: What it was made from; by default the one in the run's header. Remedies are changes of it.
        error: What it ended with: an exception, or its text.
        profile: Where its steps spend their time (`profile_steps`).

    Returns:
        Each trouble with its evidence and remedies; none if what was given shows none.

    Raises:
        ValueError: There is nothing to go by, or no recipe to change.
        TypeError: Something is of the wrong type.
    """
    for name, value, kinds, remedy in (
        ("run", run, Run, "what read_run gives"),
        ("recipe", recipe, Recipe, "a Recipe"),
        ("error", error, (str, BaseException), "an exception or its text"),
        ("profile", profile, Profile, "what profile_steps gives"),
    ):
        if value is not None and not isinstance(value, kinds):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass {remedy}")
    if run is None and error is None and profile is None:
        raise ValueError("run, error and profile are all missing, so there is nothing to go by; pass one of them")
    if recipe is None:
        given = None if run is None else run.header.get("recipe")
        if given is None:
            raise ValueError(
                "recipe is missing and the run has none in its header; pass the recipe, or give it to Monitor"
            )
        recipe = Recipe.from_dict(given)
    found: list[Diagnosis | None] = []
    memory = None if error is None else parse_out_of_memory(str(error))
    if memory is not None:
        found.append(_out_of_memory(memory, recipe))
    if run is not None:
        found += [_unstable(run, recipe), _slow_convergence(run, recipe), _overfitting(run, recipe)]
    if profile is not None:
        found.append(_slow_steps(profile, recipe))
    return [each for each in found if each is not None]


def _change(recipe: Recipe, what: str, **fields: Any) -> Remedy:
    return Remedy(what, recipe.diff(recipe.replaced(**fields)))


def _option(recipe: Recipe, what: str, **options: Any) -> Iterator[Remedy]:
    """Other options, unless the optimizer refuses them."""
    if not any(check_construction(recipe.replaced(options={**recipe.options, **options}))):
        yield _change(recipe, what, options={**recipe.options, **options})


def _keeps_float32(recipe: Recipe) -> bool:
    """Whether states are as large as they can be."""
    return recipe.resolved_options.get("state_dtype", "float32") == "float32"


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


# ---- unstable ----------------------------------------------------------------------------------------


def _unstable(run: Run, recipe: Recipe) -> Diagnosis | None:
    found = [each for each in run.anomalies if each.kind in _UNSTABLE]
    if not found:
        return None
    kinds = {each.kind for each in found}
    return Diagnosis("unstable", tuple(map(str, found[:5])), tuple(_stabilizers(run, recipe, kinds, found[0].step)))


def _stabilizers(run: Run, recipe: Recipe, kinds: set[str], first: int) -> Iterator[Remedy]:
    if recipe.precision == "float16" and kinds & {"overflow", "non_finite"}:
        yield _change(
            recipe, "compute in bfloat16, which has the range of float32", precision="bfloat16", loss_scaling=None
        )
    if recipe.lr is not None:
        raised = kinds & {"divergence", "update_spike", "oscillation"}
        why = "updates are too large" if raised else "a smaller lr bears more"
        yield _change(recipe, f"a third of the learning rate: {why}", lr=_rounded(recipe.lr / 3))
    if recipe.max_grad_norm is None:
        yield _change(recipe, "clip gradients", max_grad_norm=1.0)
    if kinds & {"exploding_gradients", "loss_spike"} and recipe.resolved_options.get("skip_step_above") is None:
        norms = [value for value in run.series("grad_norm")[1] if value == value and value != float("inf")]
        if norms:
            limit = _rounded(10 * median(norms))
            yield from _option(recipe, "leave out steps with ten times the usual gradient norm", skip_step_above=limit)
    steps = recipe.steps
    if (
        steps is not None
        and first <= 0.1 * steps
        and recipe.warmup < 0.05
        and recipe.schedule["name"] in scheduler_names()  # others have a warmup of their own
        and recipe.schedule["name"] != "constant"
    ):
        yield _change(recipe, "warm up for a twentieth of the training: it broke early", warmup=0.05)
    if "loss_spike" in kinds and recipe.betas is not None and len(recipe.betas) == 2 and recipe.betas[1] > 0.98:
        yield _change(recipe, "a shorter second moment follows gradients that grow", betas=(recipe.betas[0], 0.95))


# ---- out of memory -----------------------------------------------------------------------------------


def _out_of_memory(found: OutOfMemory, recipe: Recipe) -> Diagnosis:
    return Diagnosis("out of memory", tuple(found.sentences()), tuple(_savers(found, recipe)))


def _savers(found: OutOfMemory, recipe: Recipe) -> Iterator[Remedy]:
    if found.is_fragmented:
        yield Remedy("set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: what is reserved would do, in one piece")
    if found.elsewhere is not None and found.total and found.elsewhere > 0.1 * found.total:
        yield Remedy("end the other programs on the device: they hold a good part of it")
    batch, parts = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    small = batch // 2
    if small and not recipe.release_gradients:
        yield _change(
            recipe, "half the micro-batch, with twice the accumulation: the same batch",
            per_device_train_batch_size=small, gradient_accumulation_steps=-(-batch * parts // small),
        )  # fmt: skip
    if not recipe.gradient_checkpointing:
        yield _change(recipe, "compute activations again in the backward pass", gradient_checkpointing=True)
    if _keeps_float32(recipe):
        what = "keep states in 8 bits: 2 bytes a parameter instead of 8 with AdamW"
        yield from _option(recipe, what, state_dtype="8bit")
    if recipe.precision == "float32":
        yield _change(recipe, "compute in bfloat16: half the activations", precision="bfloat16")
    if not recipe.release_gradients and parts == 1 and recipe.loss_scaling is None:
        yield _change(recipe, "step in the backward pass and free gradients as they come", release_gradients=True)
    if small and recipe.release_gradients:
        what = "half the batch, which changes the training: released gradients are not accumulated"
        yield _change(recipe, what, per_device_train_batch_size=small)


# ---- convergence -------------------------------------------------------------------------------------


def _slow_convergence(run: Run, recipe: Recipe) -> Diagnosis | None:
    found = [each for each in run.anomalies if each.kind in _SLOW]
    if not found:
        return None
    kinds = {each.kind for each in found}
    return Diagnosis("slow convergence", tuple(map(str, found[:5])), tuple(_movers(recipe, kinds)))


def _movers(recipe: Recipe, kinds: set[str]) -> Iterator[Remedy]:
    if "zero_lr" in kinds:
        yield Remedy("make the schedule as long as the training: its lr is 0 while steps are still taken")
    if "dead_parameters" in kinds:
        yield Remedy(
            "look at the layers before those that get no gradient: a ReLU of which all is below 0, or a detach()"
        )
    if "stuck_weights" in kinds and recipe.weights_dtype != "float32":
        if recipe.resolved_options.get("master_weights") is None:
            yield from _option(recipe, "keep beside weights what 16 bits round away", master_weights="kahan")
        if recipe.resolved_options.get("rounding") is None:
            yield from _option(recipe, "round weights stochastically: right on average", rounding="stochastic")
    if recipe.lr is not None and kinds & {"plateau", "stuck_weights", "vanishing_gradients"}:
        yield _change(recipe, "three times the learning rate", lr=_rounded(recipe.lr * 3))
    if "plateau" in kinds and recipe.schedule.get("name") == "constant":
        yield _change(
            recipe, "let the learning rate fall: noise keeps a constant one from settling", schedule={"name": "cosine"}
        )


def _overfitting(run: Run, recipe: Recipe) -> Diagnosis | None:
    steps, losses = run.series("eval_loss")
    if len(losses) < 3:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    trained = run.series("loss")[1]
    if not trained:
        return None  # whether it learns by heart or not at all cannot be told
    begin, end = median(trained[: max(1, len(trained) // 4)]), median(trained[-max(1, len(trained) // 4) :])
    if best >= len(losses) - 2 or losses[-1] < 1.05 * losses[best] or end >= begin:
        return None
    evidence = (
        f"eval_loss was least in step {steps[best]:,}, {losses[best]:.4g}, and has risen to {losses[-1]:.4g}",
        f"the training's loss fell from {begin:.4g} to {end:.4g} meanwhile",
    )
    remedies = [_change(recipe, "stop where it was least", steps=steps[best], epochs=recipe.epochs)]
    decay = recipe.weight_decay or 0.0
    remedies.append(_change(recipe, "more weight decay", weight_decay=0.1 if decay < 0.1 else _rounded(2 * decay)))
    if recipe.lr is not None:
        remedies.append(_change(recipe, "half the learning rate", lr=_rounded(recipe.lr / 2)))
    return Diagnosis("overfitting", evidence, tuple(remedies))


# ---- slow steps --------------------------------------------------------------------------------------


def _slow_steps(profile: Profile, recipe: Recipe) -> Diagnosis:
    return Diagnosis("slow steps", tuple(profile.sentences()), tuple(_accelerators(profile, recipe)))


def _accelerators(profile: Profile, recipe: Recipe) -> Iterator[Remedy]:
    shares = profile.shares
    if shares["data"] > 0.15:
        workers = recipe.dataloader_num_workers
        yield _change(
            recipe, "more processes that load data: the model waits for it",
            dataloader_num_workers=4 if workers == 0 else 2 * workers,
            dataloader_prefetch_factor=recipe.dataloader_prefetch_factor or 4,
        )  # fmt: skip
    if shares["optimizer"] > 0.15:
        if recipe.gradient_accumulation_steps == 1:
            yield _change(
                recipe, "fewer steps of the optimizer: accumulate over four micro-batches",
                gradient_accumulation_steps=4, release_gradients=False,
            )  # fmt: skip
        if _keeps_float32(recipe):
            what = "states in 8 bits: less memory is read and written in a step"
            yield from _option(recipe, what, state_dtype="8bit")
    if shares["forward"] + shares["backward"] > 0.5:
        if recipe.precision == "float32":
            yield _change(recipe, "compute in bfloat16", precision="bfloat16")
        if recipe.gradient_checkpointing:
            yield _change(
                recipe, "keep activations, if memory allows: a third of the arithmetic is done twice",
                gradient_checkpointing=False,
            )  # fmt: skip
        if not recipe.compile:
            yield _change(recipe, "compile the model", compile=True)
