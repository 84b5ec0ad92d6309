"""Accelerate: prepared, clipped, accumulated, in mixed precision, sharded, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import needs_fsdp2, peer
from torch import nn
from trainers import same

import fusedopt
from fusedopt import get_scheduler
from fusedopt.schedules import Cosine

accelerate = peer("accelerate")

STEPS = 6
LR = 1e-2
SCHEDULE = Cosine(2, STEPS)
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"state_dtype": "8bit"},
    "split24": {"state_dtype": "8bit", "master_weights": "split24", "dtype": torch.bfloat16},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(2 * STEPS, 4, 64, generator=generator).to(dtype))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().square().mean()


def options(form: str) -> tuple[dict[str, Any], torch.dtype]:
    found = dict(FORMS[form])
    dtype = found.pop("dtype", torch.float32)
    return {"lr": LR, **found}, dtype


def prepared(kwargs: dict[str, Any], dtype: torch.dtype, **settings: Any) -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    model = network(dtype)
    optimizer = fusedopt.AdamW(model.parameters(), **kwargs)
    scheduler = get_scheduler(SCHEDULE, optimizer)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(made: tuple[Any, Any, Any, Any], data: list[torch.Tensor], clips: float | None = None) -> list[float]:
    """Goes through the data, and returns the lr of each step."""
    accelerator, model, optimizer, scheduler = made
    lrs = []
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                lrs.append(optimizer.param_groups[0]["lr"])
                if clips is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clips)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return lrs


def alone(kwargs: dict[str, Any], dtype: torch.dtype, clips: float | None = None) -> nn.Module:
    """The same without Accelerate."""
    model = network(dtype)
    optimizer = fusedopt.AdamW(model.parameters(), **kwargs)
    scheduler = get_scheduler(SCHEDULE, optimizer)
    for i, batch in enumerate(batches(dtype)):
        (loss_of(model, batch) / 2).backward()
        if i % 2:
            if clips is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clips)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("clips", ["in the step", "before it"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_a_plain_loop(form: str, clips: str) -> None:
    """The class, the lr of each step, and the bits; the step clips what was accumulated."""
    kwargs, dtype = options(form)
    before = 0.05 if clips == "before it" else None
    if before is None:
        kwargs["max_grad_norm"] = 0.05
    made = prepared(kwargs, dtype)
    assert type(made[2].optimizer) is fusedopt.AdamW
    lrs = train(made, batches(dtype), before)
    assert lrs == [LR * SCHEDULE(step) for step in range(STEPS)]
    assert same(made[1], alone(kwargs, dtype, before))
    if before is None:
        assert made[2].optimizer.last_grad_norm > 0.05


def test_mixed_precision() -> None:
    """bfloat16 arithmetic, float32 weights."""
    kwargs, dtype = options("8bit")
    made = prepared(kwargs, dtype, mixed_precision="bf16")
    train(made, batches())
    model = network()
    optimizer = fusedopt.AdamW(model.parameters(), **kwargs)
    scheduler = get_scheduler(SCHEDULE, optimizer)
    for i, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        (loss / 2).backward()
        if i % 2:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert same(made[1], model)


@pytest.mark.parametrize("form", FORMS)
def test_resuming_is_never_having_stopped(form: str, tmp_path: Path) -> None:
    kwargs, dtype = options(form)
    made = prepared(kwargs, dtype)
    data = batches(dtype)
    half = len(data) // 2
    lrs = train(made, data[:half])
    made[0].save_state(str(tmp_path))
    lrs += train(made, data[half:])
    whole = made[1]
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    again = prepared({**kwargs, "lr": 1.0}, dtype)
    again[0].load_state(str(tmp_path))
    assert train(again, data[half:]) == lrs[half // 2 :]
    assert same(whole, again[1])


@pytest.fixture
def fsdp2(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any], torch.dtype], tuple[Any, Any, Any, Any]]:
    """Prepares a run with Accelerate's FSDP2 plugin in a world of one.

    Accelerate offers its plugin on accelerators only, so its state is told that it is there.
    """
    needs_fsdp2()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "29500")  # nobody listens there: the process group exists

    def prepare(kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type="SHARDED_STATE_DICT"
        )
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        shared = accelerate.state.AcceleratorState._shared_state
        shared["distributed_type"], shared["fsdp_plugin"] = accelerate.DistributedType.FSDP, plugin
        model = network(dtype)
        optimizer = fusedopt.AdamW(model.parameters(), **kwargs)
        scheduler = get_scheduler(SCHEDULE, optimizer)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    return prepare


def test_fsdp2_plugin(fsdp2: Callable[..., tuple[Any, Any, Any, Any]]) -> None:
    """Accelerate shards the model and gives the optimizer the shards; a world of one has the bits of a plain loop."""
    kwargs, dtype = options("8bit")
    made = fsdp2(kwargs, dtype)
    assert all(isinstance(param, dist.tensor.DTensor) for param in made[1].parameters())
    assert made[2].param_groups[0]["params"] == list(made[1].parameters())
    lrs = train(made, batches())
    assert lrs == [LR * SCHEDULE(step) for step in range(STEPS)]
    assert any("exp_avg_codes" in state for state in made[2].state.values())
    for sharded, whole in zip(made[1].parameters(), alone(kwargs, dtype).parameters(), strict=True):
        assert torch.equal(sharded.to_local(), whole)


def test_fsdp2_plugin_saves_and_loads(fsdp2: Callable[..., tuple[Any, Any, Any, Any]], tmp_path: Path) -> None:
    """Its sharded checkpoint, loaded into a new run: the bits of never having stopped.

    By the functions that save_state and load_state call for FSDP where there is an accelerator.
    """
    kwargs, dtype = options("8bit")
    data = batches(dtype)
    half = len(data) // 2
    made = fsdp2(kwargs, dtype)
    train(made, data[:half])
    utils, plugin = accelerate.utils, made[0].state.fsdp_plugin
    utils.save_fsdp_model(plugin, made[0], made[1], str(tmp_path))
    utils.save_fsdp_optimizer(plugin, made[0], made[2], made[1], str(tmp_path))
    saved = made[3].state_dict()

    again = fsdp2({**kwargs, "lr": 1.0}, dtype)
    utils.load_fsdp_model(plugin, again[0], again[1], str(tmp_path))
    utils.load_fsdp_optimizer(plugin, again[0], again[2], again[1], str(tmp_path))
    again[3].load_state_dict(saved)
    train(again, data[half:])
    for sharded, whole in zip(again[1].parameters(), alone(kwargs, dtype).parameters(), strict=True):
        assert torch.equal(sharded.to_local(), whole)
