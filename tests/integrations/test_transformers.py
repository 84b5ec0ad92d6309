"""transformers' Trainer with our optimizers, by each of the ways in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from trainers import LR, STEPS, arguments, bert, logged, same, trainer

# Releases of it need newer releases of torch than we do, and say so when what they import lazily is asked for.
pytest.importorskip("transformers.trainer_callback", exc_type=Exception)

import fusedopt
from fusedopt.integrations import transformers as ours

transformers = peer("transformers")
peer("accelerate")

NAMES = [name for name, refusal in ours.names().items() if refusal is None]


def unwrapped(made: Any) -> Any:
    return made.optimizer.optimizer


# ---- the ways in ------------------------------------------------------------------------------------


def by_argument(folder: Path, model: Any, args: Any, **options: Any) -> Any:
    return trainer(folder, model, args, optimizer_cls_and_kwargs=ours.optimizer(args, **options))


def by_table(folder: Path, model: Any, args: Any, **options: Any) -> Any:
    ours.enable(**options)
    return trainer(folder, model, args)


def by_subclass(folder: Path, model: Any, args: Any, **options: Any) -> Any:
    return trainer(folder, model, args, ours.FusedTrainer, optimizer_options=options)


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    ours.disable()


WAYS = {"argument": by_argument, "table": by_table, "subclass": by_subclass}


@pytest.mark.parametrize("way", WAYS)
def test_ours_is_what_steps(way: str, tmp_path: Path) -> None:
    """The class, Trainer's decay groups, and the bits of a loop without Trainer."""
    model = bert(dropout=0.0)
    args = arguments(tmp_path, optim="adamw_8bit", max_steps=3, max_grad_norm=0.5, lr_scheduler_type="constant")
    made = WAYS[way](tmp_path, model, args)
    made.train()
    optimizer = unwrapped(made)
    assert type(optimizer) is fusedopt.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["state_dtype"] for group in optimizer.param_groups} == {"8bit"}
    assert optimizer.defaults["max_grad_norm"] == 0.5
    assert any("exp_avg_codes" in state for state in optimizer.state.values())
    alone = bert(dropout=0.0).train()
    decays = made.get_decay_parameter_names(alone)
    named = list(alone.named_parameters())
    groups = [
        {"params": [p for n, p in named if (n in decays) == decaying], "weight_decay": 0.1 if decaying else 0.0}
        for decaying in (True, False)
    ]
    loop = fusedopt.AdamW(groups, lr=LR, state_dtype="8bit", max_grad_norm=0.5)
    transformers.set_seed(args.seed)  # which orders the data
    for _, batch in zip(range(3), trainer(tmp_path, alone, args).get_train_dataloader()):
        alone(**batch).loss.backward()
        loop.step()
        loop.zero_grad()
    assert same(model, alone)


@pytest.mark.parametrize("way", ["table", "subclass"])
def test_trainer_neither_clips_nor_measures(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs the norm of the step, and takes none itself."""
    norms: list[float] = []

    def fails(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Trainer clips")

    with ours.enable(state_dtype="bfloat16"):
        made = trainer(
            tmp_path, bert(), arguments(tmp_path, max_steps=4), *([ours.FusedTrainer] if way == "subclass" else [])
        )
        monkeypatch.setattr(made.accelerator, "clip_grad_norm_", fails)
        made.add_callback(Norms(norms))
        made.train()
    assert logged(made, "grad_norm") == norms
    assert len(set(norms)) == 4


class Norms(transformers.TrainerCallback):
    def __init__(self, norms: list[float]) -> None:
        self.norms = norms

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append(float(kwargs["optimizer"].optimizer.last_grad_norm))


def test_the_argument_leaves_measuring_to_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2)
    made = by_argument(tmp_path, bert(), args)
    made.train()
    assert args.max_grad_norm == 0
    assert len(logged(made, "grad_norm")) == 2
    # Asked again, as a search over hyperparameters does, it still clips.
    assert ours.optimizer(args)[1]["max_grad_norm"] == 1.0
    args.max_grad_norm = 0.25
    assert ours.optimizer(args)[1]["max_grad_norm"] == 0.25


def test_enable_serves_all_names_and_is_undone(tmp_path: Path) -> None:
    table = peer("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
    before, methods = dict(table), dict(vars(transformers.Trainer))
    with ours.enable(state_dtype="bfloat16"):
        assert {key.value for key in table if table[key] is not before[key]} == set(NAMES)
        with ours.enable():  # another, within
            assert transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path))[1].get("state_dtype") is None
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="lion_32bit"))
        assert (cls, kwargs["state_dtype"]) == (fusedopt.Lion, "bfloat16")
    assert dict(table) == before
    assert dict(vars(transformers.Trainer)) == methods
    ours.enable()
    ours.disable()
    ours.disable()
    assert dict(table) == before


def test_a_transformers_without_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer._OPTIMIZER_HANDLERS", {})
    with pytest.raises(RuntimeError, match=r"transformers [\d.]+ is not known to enable\(\).*pass optimizer_cls_"):
        ours.enable()


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_may_keep_their_precision(way: str, tmp_path: Path) -> None:
    model = bert()
    made = WAYS[way](tmp_path, model, arguments(tmp_path, optim="adamw_8bit", max_steps=1), keep_embeddings=True)
    made.train()
    optimizer = unwrapped(made)
    tables = {p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    codes = {p for p, state in optimizer.state.items() if "exp_avg_codes" in state}
    assert tables
    assert codes
    assert not tables & codes
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    decays = made.get_decay_parameter_names(model)
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert {names[p] in decays for p in group["params"]} == {group["weight_decay"] > 0}


def test_each_training_has_the_arguments_of_now(tmp_path: Path) -> None:
    """As a search of hyperparameters changes them, which sets the optimizer to None before each trial."""
    made = by_subclass(tmp_path, bert(), arguments(tmp_path), keep_embeddings=True, state_dtype="8bit")
    for lr, max_norm in ((1e-3, 0.5), (5e-2, 0.25)):
        made.args.learning_rate = made.args.weight_decay = lr
        made.args.max_grad_norm, made.optimizer = max_norm, None
        groups = made.create_optimizer().param_groups
        assert {(group["lr"], group["max_grad_norm"]) for group in groups} == {(lr, max_norm)}
        assert lr in {group["weight_decay"] for group in groups}
        assert len({group["state_dtype"] for group in groups}) == 2  # embeddings keep theirs in each


def test_optim_args_are_arguments(tmp_path: Path) -> None:
    def kwargs(name: str, text: str) -> dict[str, Any]:
        cls, found = ours.optimizer(arguments(tmp_path, optim=name, optim_args=text))
        return cls([torch.nn.Parameter(torch.ones(3))], **found).defaults

    assert kwargs("adamw_torch", "amsgrad=True, state_dtype=bfloat16")["amsgrad"] is True
    assert kwargs("ademamix", "beta3=0.999,alpha=2,t_alpha=100")["betas"] == (0.9, 0.999, 0.999)
    assert kwargs("sgd", "momentum=0.9,nesterov=yes")["nesterov"] is True
    assert kwargs("adamw_torch_8bit", "bf16_stochastic_round=True")["rounding"] == "stochastic"
    assert kwargs("adamw_anyprecision", "use_kahan_summation=True,momentum_dtype=bfloat16")["master_weights"] == "kahan"
    with pytest.raises(TypeError, match=r"AdamW got an unknown argument momentun=0\.9"):
        kwargs("adamw_torch", "momentun=0.9")
    with pytest.raises(ValueError, match="optim_args has 'nesterov', which has no value"):
        kwargs("sgd", "nesterov")


def test_a_warmup_inside_the_optimizer(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="schedule_free_adamw", warmup_steps=7)
    assert ours.optimizer(args)[1]["warmup_steps"] == 7
    args = arguments(tmp_path, optim="schedule_free_adamw", warmup_steps=0.25)
    assert ours.optimizer(args)[1]["warmup_steps"] == STEPS / 4
    args = arguments(tmp_path, optim="schedule_free_sgd", warmup_steps=0.25, max_steps=-1)
    with pytest.raises(ValueError, match=r"warmup_steps=0\.25 is a ratio of a training whose length"):
        ours.optimizer(args)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw", "schedule_free_radam"])
def test_schedule_free_evaluates_averages_and_resumes(name: str, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> Any:
        args = arguments(
            tmp_path,
            optim=name,
            save_strategy="steps",
            save_steps=10,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=5,
        )
        made = trainer(tmp_path, bert(), args, ours.FusedTrainer)
        made.train(resume_from_checkpoint=resume)
        return made

    whole, resumed = run(), run(str(tmp_path / "checkpoint-10"))
    assert same(whole.model, resumed.model)
    assert not unwrapped(whole).param_groups[0]["train_mode"]  # after the last evaluation
    assert unwrapped(whole).param_groups[0]["k"] == STEPS


def test_what_cannot_be_is_said_before_training(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="galore_adamw")
    for make in (lambda: ours.optimizer(args), lambda: by_subclass(tmp_path, bert(), args).create_optimizer()):
        with pytest.raises(ValueError, match="optimizer name 'galore_adamw' projects gradients"):
            make()
    with pytest.raises(ValueError, match="state_dtype='9bit'"):
        ours.optimizer(args, "adamw_8bit", state_dtype="9bit")
    assert args.max_grad_norm == 1.0  # nothing was touched


def test_sharded_steps_do_not_clip(tmp_path: Path) -> None:
    """A step that sees a part of each gradient would clip each part by itself."""
    args = arguments(tmp_path)
    args.fsdp, args.fsdp_config = "full_shard", {"version": 1}
    assert ours.optimizer(args)[1]["max_grad_norm"] is None
    assert args.max_grad_norm == 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.5 in the step would clip each part"):
        ours.optimizer(args, max_grad_norm=0.5)
    args.fsdp_config = {"version": 2}
    assert ours.optimizer(args)[1]["max_grad_norm"] == 1.0


# ---- training ---------------------------------------------------------------------------------------


def test_learning_rates_and_losses_are_those_of_torch_with_clipping(tmp_path: Path) -> None:
    """50 clipped steps: the same data, lr and losses as with torch's AdamW."""
    runs = []
    for cls, kwargs in ((None, {}), (ours.FusedTrainer, {})):
        args = arguments(tmp_path, optim="adamw_torch", max_steps=50, warmup_steps=5, max_grad_norm=0.3)
        made = trainer(tmp_path, bert(), args, cls, **kwargs)
        made.train()
        runs.append(made)
    theirs, mine = runs
    assert type(unwrapped(theirs)) is torch.optim.AdamW
    assert logged(mine, "learning_rate") == logged(theirs, "learning_rate")
    assert logged(mine, "learning_rate")[:6] == [LR * (s / 5) for s in range(6)]
    norms = logged(mine, "grad_norm")
    assert min(norms) > 0.3  # all of them are clipped
    # torch sums squares and steps in another order, in float32; 50 steps later losses differ by a few units of 1e-7.
    for mine_at, theirs_at in zip(logged(mine, "loss"), logged(theirs, "loss"), strict=True):
        assert abs(mine_at / theirs_at - 1) <= 1e-6


RESUMED: dict[str, dict[str, Any]] = {
    "8bit": {"state_dtype": "8bit"},
    "split24": {"state_dtype": "8bit", "master_weights": "split24", "dtype": torch.bfloat16},
    "bf16": {"state_dtype": "bfloat16", "dtype": torch.bfloat16, "rounding": "stochastic"},
}


@pytest.mark.parametrize("form", ["8bit", "split24", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_ten_and_ten_steps_are_twenty(form: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout, a schedule, our callback, and what is stored in few bits."""
    options = dict(RESUMED[form])
    dtype = options.pop("dtype", torch.float32)

    def run(resume: str | None = None) -> Any:
        args = arguments(tmp_path, save_strategy="steps", save_steps=10, lr_scheduler_type="cosine")
        made = trainer(tmp_path, bert(dtype), args, ours.FusedTrainer, optimizer_options=options)
        ours.add_callback(made)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-10"))
    assert whole.state.global_step == resumed.state.global_step == STEPS
    assert same(whole.model, resumed.model)
    states = [unwrapped(made).state_dict()["state"] for made in (whole, resumed)]
    for index, held in states[0].items():
        assert held.keys() == states[1][index].keys()
        assert all(torch.equal(value, states[1][index][key]) for key, value in held.items())
    for key in ("loss", "grad_norm", "learning_rate", "grad_norm_max"):
        assert logged(whole, key) == logged(resumed, key)


def test_the_callback_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Memory at the start, scalars that TensorBoard shows, and anomalies as warnings."""
    args = arguments(tmp_path, max_steps=6, logging_steps=2)
    made = trainer(tmp_path, bert(), args, ours.FusedTrainer, optimizer_options={"state_dtype": "8bit"})
    ours.add_callback(made, health=True, spike=1.0001)
    made.add_callback(Spoils(4))
    with caplog.at_level(logging.INFO, logger="fusedopt.integrations.transformers"):
        made.train()
    assert f"{sum(p.numel() for p in made.model.parameters()):,} parameters" in caplog.text
    row = next(row for row in made.state.log_history if row.get("step") == 4)
    assert row["nonfinite_steps"] == 1
    assert 0 <= row["stalled_weights"] <= 1
    assert 0 < row["saturated_codes"] < 0.2
    assert "step 4: the gradient norm was inf or NaN in 1 of the last 2 steps" in caplog.text
    assert "times its average" in caplog.text
    first = made.state.log_history[0]
    assert first["grad_norm_max"] >= first["grad_norm"] > 0
    assert first["nonfinite_steps"] == 0


class Spoils(transformers.TrainerCallback):
    """Makes a gradient infinite before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            next(kwargs["model"].parameters()).grad[0] = torch.inf


def test_the_callback_is_for_our_optimizers(tmp_path: Path) -> None:
    made = trainer(tmp_path, bert(), arguments(tmp_path, optim="adamw_torch"), callbacks=[ours.FusedCallback()])
    with pytest.raises(TypeError, match="the trainer's optimizer is a AdamW, of which FusedCallback knows nothing"):
        made.train()
    with pytest.raises(ValueError, match=r"spike=1\.0 would report ordinary steps"):
        ours.FusedCallback(spike=1.0)


def test_tensorboard_shows_the_scalars(tmp_path: Path) -> None:
    reader = peer("tensorboard.backend.event_processing.event_accumulator")
    args = arguments(tmp_path, max_steps=4, report_to=["tensorboard"])
    made = trainer(tmp_path, bert(), args, ours.FusedTrainer)
    ours.add_callback(made)
    made.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = reader.EventAccumulator(str(file)).Reload()
    for key in ("grad_norm", "grad_norm_max", "nonfinite_steps", "learning_rate", "loss"):
        found = [event.value for event in events.Scalars(f"train/{key}")]
        assert found == pytest.approx(logged(made, key), rel=1e-7), key  # written as float32


def test_the_step_clips_what_has_been_accumulated(tmp_path: Path) -> None:
    norms = []
    for cls in (None, ours.FusedTrainer):
        args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=0.1)
        made = trainer(tmp_path, bert(), args, cls)
        made.train()
        norms.append(logged(made, "grad_norm"))
    # torch sums squares in float32.
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_a_step_that_gradscaler_skips_has_no_norm() -> None:
    """The norm that is logged is of that step, not of the one before it."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.AdamW([{"params": []}, {"params": [param]}], max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    norms = []
    for gradient in (1.0, torch.inf, 2.0):
        scaler.scale((gradient * param).sum()).backward()
        norms.append(ours._norm_to_come(optimizer))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert [float(norm) for norm in norms] == pytest.approx([2.0, torch.nan, 4.0], nan_ok=True)
    assert not optimizer._optimizer_step_post_hooks  # nothing is left behind
