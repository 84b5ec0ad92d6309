"""DeepSpeed: ZeRO-1 and ZeRO-2 with a client optimizer, and our step where its state is on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import peer
from torch import nn
from trainers import same

import fusedopt


@pytest.fixture(scope="module")
def deepspeed() -> Iterator[Any]:
    """A world of one, without the library for shared memory, which DeepSpeed would compile now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "0")
        module = peer("deepspeed")
        patch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        yield module
        dist.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))


def engine_of(deepspeed: Any, stage: int, offloads: bool, optimizer: Any, model: nn.Module) -> Any:
    zero: dict[str, Any] = {"stage": stage}
    if offloads:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine


def train(engine: Any, steps: range) -> list[float]:
    lrs = []
    for step in steps:
        batch = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        engine.backward(engine(batch).float().square().mean())
        lrs.append(engine.get_lr()[0])
        engine.step()
    return lrs


@pytest.mark.parametrize(("stage", "offloads"), [(1, False), (2, False), (2, True)])
def test_ours_steps_what_zero_hands_it(deepspeed: Any, stage: int, offloads: bool, tmp_path: Path) -> None:
    """Class, lr, closeness to torch's AdamW in its place, and a resume that is never having stopped."""

    def make(cls: Any = fusedopt.AdamW) -> Any:
        model = network()
        if cls is not fusedopt.AdamW:
            return engine_of(deepspeed, stage, offloads, cls(model.parameters(), lr=1e-2), model)
        optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2)
        return engine_of(deepspeed, stage, offloads, optimizer, model)

    engine = make()
    assert type(engine.optimizer.optimizer) is fusedopt.AdamW
    assert train(engine, range(3)) == [1e-2] * 3
    theirs = make(torch.optim.AdamW)
    train(theirs, range(3))
    for mine, other in zip(engine.module.parameters(), theirs.module.parameters(), strict=True):
        # Both step float32 weights, of which these are bfloat16 copies; one may round to the next.
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-4)
    engine.save_checkpoint(str(tmp_path))
    train(engine, range(3, 6))
    resumed = make()
    resumed.load_checkpoint(str(tmp_path))
    train(resumed, range(3, 6))
    assert same(engine.module, resumed.module)
