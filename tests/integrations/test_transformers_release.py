"""transformers' Trainer with optimizers that step during the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import peer
from trainers import arguments, bert, logged, same, trainer

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
    args = arguments(tmp_path, optim="adalomo")
    args.deepspeed = "config.json"
    ours.enable()
    with pytest.raises(ValueError, match=r"optim='adalomo' steps a gradient as soon.*use FSDP2, or optim='adafactor'"):
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
