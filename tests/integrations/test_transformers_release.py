"""transformers' Trainer with optimizers that step during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import peer
from trainers import arguments, bert, logged, same, trainer

# Releases of it need newer releases of torch than we do, and say so when what they import lazily is asked for.
pytest.importorskip("transformers.trainer_callback", exc_type=Exception)

from fusedopt.integrations import transformers as ours

transformers = peer("transformers")
peer("accelerate")


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    ours.disable()


def unwrapped(made: Any) -> Any:
    return made.optimizer.optimizer


@pytest.mark.parametrize(
    ("way", "changes"),
    [("table", {"max_grad_norm": 0.0}), ("subclass", {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2})],
)
@pytest.mark.parametrize(("name", "plain"), [("lomo", "sgd"), ("adalomo", "adafactor")])
def test_steps_during_the_backward_pass(name: str, plain: str, way: str, changes: Any, tmp_path: Path) -> None:
    """The bits, the norms and the learning rates of the optimizer whose gradients are released."""
    settings = {"max_steps": 3, **changes}
    extra = {"optim_args": "scale_parameter=True"} if plain == "adafactor" else {}
    models, made = [], []
    for optim, more in ((name, {}), (plain, extra)):
        models.append(bert())
        args = arguments(tmp_path, optim=optim, **settings, **more)
        if way == "table":
            ours.enable()
        made.append(trainer(tmp_path, models[-1], args, ours.FusedTrainer if way == "subclass" else None))
        if optim == name:
            made[-1].add_callback(Freed())
        made[-1].train()
        ours.disable()
    handle = unwrapped(made[0]).release_handle
    assert handle is not None
    assert unwrapped(made[1]).release_handle is None
    assert same(*models)
    assert not same(models[0], bert())
    assert logged(made[0], "learning_rate") == logged(made[1], "learning_rate")
    if changes["max_grad_norm"]:
        assert logged(made[0], "grad_norm") == logged(made[1], "grad_norm")
    assert "backward" not in vars(made[0].accelerator)


class Freed(transformers.TrainerCallback):
    """Gradients are all stepped, but those of the last bucket, which step() steps."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        assert optimizer.release_handle._settings is not None, "no backward pass has stepped"


def test_the_argument_cannot_step_during_the_backward_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name 'lomo' steps during the backward pass.*call enable\(\).*FusedTrainer"):
        ours.optimizer(arguments(tmp_path, optim="lomo"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim": "lomo", "deepspeed": "c.json"},
            r"optim='lomo' steps a gradient as soon.*; use FSDP2, or optim='sgd'",
        ),
        (
            {"optim": "adalomo", "deepspeed": "c.json"},
            r"optim='adalomo' steps a gradient.*later; use optim='adafactor'",
        ),
        ({"optim": "adalomo", "fsdp": True}, r"optim='adalomo' sums over the shards of FSDP2.*use optim='adafactor'"),
        ({"optim": "lomo", "fp16": True}, r"fp16=True with optim='lomo': losses are scaled.*Train with bf16=True"),
        (
            {"optim": "lomo", "fsdp": True, "gradient_accumulation_steps": 2},
            r"optim='lomo' with max_grad_norm measures.*'sync_each_batch': True.*or max_grad_norm=0",
        ),
    ],
)
def test_trainings_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for key, value in changes.items():
        setattr(args, key, value)
    ours.enable()
    with pytest.raises(ValueError, match=message):
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)


def test_shards_are_stepped(tmp_path: Path) -> None:
    """Where nothing has to be accumulated before it is measured."""
    for changes in ({}, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}):
        args = arguments(tmp_path, **changes)
        args.optim, args.fsdp = "lomo", True
        ours.enable()
        assert callable(transformers.Trainer.get_optimizer_cls_and_kwargs(args)[0])


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_scaled_losses_are_refused_before_a_backward_pass(max_grad_norm: float, tmp_path: Path) -> None:
    """Accelerate's own settings may ask for float16, too."""
    ours.enable()
    model = bert()
    made = trainer(tmp_path, model, arguments(tmp_path, optim="lomo", max_steps=1, max_grad_norm=max_grad_norm))
    made.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"float16 with GradScaler: losses are scaled.*Train with bf16=True"):
        made.train()
    assert same(model, bert())


def test_another_backward_of_the_accelerator_stays(tmp_path: Path) -> None:
    ours.enable()
    made = trainer(tmp_path, bert(), arguments(tmp_path, optim="lomo", max_steps=1, max_grad_norm=0.0))
    theirs = made.accelerator.backward = made.accelerator.backward
    made.train()
    assert vars(made.accelerator)["backward"] is theirs


@pytest.mark.parametrize("keep_embeddings", [False, True])
@pytest.mark.parametrize("way", ["table", "subclass"])
@pytest.mark.parametrize("name", ["lomo", "sgd"])
def test_a_trainers_groups(name: str, way: str, keep_embeddings: bool, tmp_path: Path) -> None:
    """What decays is what the trainer says, and embeddings keep their precision only if they are to."""
    options = {"state_dtype": "8bit", "momentum": 0.9, "keep_embeddings": keep_embeddings}

    class Decays(transformers.Trainer if way == "table" else ours.FusedTrainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters() if "query" in name]

    if way == "table":
        ours.enable(**options)
    model, given = bert(), {} if way == "table" else {"optimizer_options": options}
    made = Decays(model=model, args=arguments(tmp_path, optim=name), **given)
    optimizer = made.create_optimizer()
    assert (optimizer.release_handle is None) is (name == "sgd")
    names = {param: name for name, param in model.named_parameters()}
    listed = {names[param]: group for group in optimizer.param_groups for param in group["params"]}
    assert listed.keys() == set(names.values())
    assert {name for name, group in listed.items() if group["weight_decay"]} == set(
        Decays.get_decay_parameter_names(made, model)
    )
    kept = {name for name, group in listed.items() if group["state_dtype"] == "float32"}
    tables = {n for n in listed if "embeddings" in n and "LayerNorm" not in n}
    assert kept == (tables if keep_embeddings else set())
