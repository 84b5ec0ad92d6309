"""Diagnosis: from what was measured to remedies that can be applied."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")

import fusedopt.schedules
from fusedopt.engine.optimizer import CLASSES
from fusedopt.optimizers.names import optimizer_names
from fusedopt.training import Recipe, diagnose, profile_steps, validate
from fusedopt.training.diagnose import Diagnosis
from fusedopt.training.diagnose_memory import parse_out_of_memory
from fusedopt.training.diagnose_profile import Profile
from fusedopt.training.monitor_runs import Run

RECIPE = Recipe(optimizer="adamw", lr=3e-3, steps=1_000, per_device_train_batch_size=8)


def run_of(*kinds: str, step: int = 50, **series: list[float]) -> Run:
    run = Run()
    count = max([100, *map(len, series.values())])
    for i in range(count):
        record: dict[str, Any] = {"step": i + 1, "loss": 2.0, "grad_norm": 1.0}
        record.update({name: values[i] for name, values in series.items() if i < len(values)})
        run.records.append(record)
    run.records[step - 1]["anomalies"] = [
        {"kind": kind, "value": 9.0, "limit": 3.0, "message": f"this is {kind}"} for kind in kinds
    ]
    return run


def only(found: list[Diagnosis], trouble: str) -> Diagnosis:
    assert [each.trouble for each in found] == [trouble]
    return found[0]


def changes(found: Diagnosis) -> list[dict[str, Any]]:
    """Of each remedy; every one must be applicable to the recipe, and give one that is read again."""
    result = []
    for remedy in found.remedies:
        changed = RECIPE.apply(remedy.change)
        assert Recipe.from_dict(changed.to_dict()) == changed
        result.append({change.field: change.after for change in remedy.change})
    return result


@pytest.mark.parametrize("kind", ["divergence", "update_spike", "oscillation", "non_finite"])
def test_unstable(kind: str) -> None:
    found = only(diagnose(run_of(kind), RECIPE), "unstable")
    assert found.evidence == (f"step 50: this is {kind}",)
    assert changes(found)[:2] == [{"lr": 1e-3}, {"max_grad_norm": 1.0}]
    assert {"warmup": 0.05} in changes(found)  # it broke in the first tenth
    assert {"warmup": 0.05} not in changes(
        only(diagnose(run_of(kind, step=100), RECIPE.replaced(steps=500)), "unstable")
    )


def test_spikes_of_gradients_are_left_out() -> None:
    found = only(diagnose(run_of("exploding_gradients", "loss_spike"), RECIPE), "unstable")
    assert {"options.skip_step_above": 10.0} in changes(found)
    assert {"betas": [0.9, 0.95]} in [{k: list(v) if k == "betas" else v for k, v in c.items()} for c in changes(found)]


def test_float16_that_overflows() -> None:
    recipe = RECIPE.replaced(precision="float16", loss_scaling="dynamic")
    found = only(diagnose(run_of("overflow"), recipe), "unstable")
    assert recipe.apply(found.remedies[0].change) == RECIPE.replaced(precision="bfloat16")


# As torch 1.13, 2.1 and 2.6 wrote them, and the CPU's allocator; numbers as facts.
MESSAGES = {
    "1.13": (
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.69 GiB total capacity; 20.10 GiB already "
        "allocated; 1.06 GiB free; 22.00 GiB reserved in total by PyTorch) If reserved memory is >> "
        "allocated memory try setting max_split_size_mb to avoid fragmentation.",
        {"asked": 2.0, "total": 23.69, "free": 1.06, "allocated": 20.10, "unallocated": 1.90},
        False,
    ),
    "2.1": (
        "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacty of 23.69 GiB of which "
        "0.25 GiB is free. Process 1234 has 5.00 GiB memory in use. Including non-PyTorch memory, this "
        "process has 18.00 GiB memory in use. Of the allocated memory 14.00 GiB is allocated by PyTorch, and "
        "3.50 GiB is reserved by PyTorch but unallocated.",
        {"asked": 0.5, "total": 23.69, "free": 0.25, "in_process": 18.0, "allocated": 14.0, "unallocated": 3.5},
        True,
    ),
    "2.6": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity "
        "of 79.15 GiB of which 10.00 MiB is free. Including non-PyTorch memory, this process has 79.13 GiB "
        "memory in use. Of the allocated memory 78.00 GiB is allocated by PyTorch, and 10.00 MiB is reserved "
        "by PyTorch but unallocated.",
        {"asked": 20 / 1024, "total": 79.15, "free": 10 / 1024, "in_process": 79.13, "allocated": 78.0},
        False,
    ),
    "CPU": (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)",
        {"asked": 400000000000 / 2**30},
        False,
    ),
}


@pytest.mark.parametrize("version", MESSAGES)
def test_out_of_memory(version: str) -> None:
    text, expected, is_fragmented = MESSAGES[version]
    parsed = parse_out_of_memory(f"Traceback ...\n{text}\n")
    assert parsed is not None
    for name, size in expected.items():
        assert getattr(parsed, name) == pytest.approx(size * 2**30, abs=2**20), name  # messages have two digits
    assert parsed.is_fragmented == is_fragmented
    found = only(diagnose(recipe=RECIPE, error=RuntimeError(text)), "out of memory")
    assert ("expandable_segments" in found.remedies[0].what) == is_fragmented
    listed = changes(found)
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert (
        listed.index(halved)
        < listed.index({"gradient_checkpointing": True})
        < listed.index({"options.state_dtype": "8bit"})
    )
    if version == "2.1":
        assert any("other programs" in sentence for sentence in found.evidence)


def test_what_torch_says_here() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**46, dtype=torch.float32)
    parsed = parse_out_of_memory(str(error.value))
    assert parsed is not None
    assert parsed.asked == 2**48


def test_another_error_is_no_trouble_of_memory() -> None:
    assert diagnose(recipe=RECIPE, error="shape mismatch") == []


def test_slow_convergence() -> None:
    found = only(diagnose(run_of("plateau"), RECIPE.replaced(schedule={"name": "constant"})), "slow convergence")
    assert [[change.field for change in remedy.change] for remedy in found.remedies] == [["lr"], ["schedule.name"]]
    recipe = RECIPE.replaced(weights_dtype="bfloat16")
    found = only(diagnose(run_of("stuck_weights"), recipe), "slow convergence")
    assert recipe.apply(found.remedies[0].change).options == {"master_weights": "kahan"}
    found = only(diagnose(run_of("dead_parameters", "zero_lr"), RECIPE), "slow convergence")
    assert all(not remedy.change for remedy in found.remedies)


def test_overfitting() -> None:
    falling = [2.0 - 0.01 * i for i in range(100)]
    rising = [1.5, 1.2, 1.0, 1.1, 1.2, 1.3]
    found = only(diagnose(run_of(loss=falling, eval_loss=rising), RECIPE), "overfitting")
    assert changes(found) == [{"steps": 3}, {"weight_decay": 0.1}, {"lr": 1.5e-3}]
    assert diagnose(run_of(loss=falling, eval_loss=sorted(rising, reverse=True)), RECIPE) == []
    assert diagnose(run_of(loss=falling[::-1], eval_loss=rising), RECIPE) == []  # that is something else
    evaluated = run_of(eval_loss=rising)
    for record in evaluated.records:
        del record["loss"]
    assert diagnose(evaluated, RECIPE) == []  # nor can that be told


@pytest.mark.parametrize("name", [name for name in optimizer_names() if name in CLASSES])
def test_remedies_can_be_applied_and_change_something(name: str) -> None:
    """For every name of an optimizer, with what it stands for, gradients that are released, and any schedule."""
    composed = (fusedopt.schedules.warmup(50) >> fusedopt.schedules.constant()).to_dict()
    recipe = Recipe(
        optimizer=name, lr=1e-5, steps=1_000, per_device_train_batch_size=16, release_gradients=True,
        precision="bfloat16", weights_dtype="bfloat16", schedule=composed,
    )  # fmt: skip
    before = recipe.resolved_options
    found = diagnose(
        run_of("non_finite", "loss_spike", "stuck_weights", step=5), recipe, error="CUDA out of memory. Tried to "
        "allocate 2.00 GiB.", profile=Profile(0.3, 0.1, 0.3, 0.3),
    )  # fmt: skip
    assert [each.trouble for each in found] == ["out of memory", "unstable", "slow convergence", "slow steps"]
    for each in found:
        for remedy in each.remedies:
            assert remedy.change
            changed = recipe.apply(remedy.change)
            assert changed.resolved_options != before or changed.options == recipe.options
            built = changed.replaced(schedule={"name": "constant"})
            assert [f for f in validate(built).errors if f.field != "lr"] == [], remedy


def test_slow_steps() -> None:
    waits = only(diagnose(recipe=RECIPE, profile=Profile(0.6, 0.1, 0.2, 0.1)), "slow steps")
    assert changes(waits)[0] == {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 4}
    steps = only(diagnose(recipe=RECIPE, profile=Profile(0.0, 0.1, 0.3, 0.6)), "slow steps")
    assert changes(steps)[0] == {"gradient_accumulation_steps": 4}
    computes = only(diagnose(recipe=RECIPE, profile=Profile(0.0, 0.4, 0.6, 0.0)), "slow steps")
    assert changes(computes)[0] == {"precision": "bfloat16"}


def test_profiling() -> None:
    param = torch.nn.Parameter(torch.ones(4))

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            time.sleep(0.01)
            super().step()

    def batches() -> Any:
        for _ in range(6):
            time.sleep(0.03)
            yield torch.ones(4)

    profile = profile_steps(batches(), lambda batch: (param * batch).sum(), Slow([param], lr=0.1), steps=4)
    assert profile.data >= 0.03
    assert profile.optimizer >= 0.01
    assert sum(profile.shares.values()) == pytest.approx(1.0)
    assert param[0].item() == pytest.approx(1 - 0.6)  # warmup and steps are real
    with pytest.raises(ValueError, match=r"batches ended after 6, and 2 \+ 10 are needed"):
        profile_steps(batches(), lambda batch: (param * batch).sum(), Slow([param], lr=0.1))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="nothing to go by; pass one of them"):
        diagnose(recipe=RECIPE)
    with pytest.raises(ValueError, match="recipe is missing and the run has none in its header"):
        diagnose(run_of("divergence"))
    run = run_of("divergence")
    run.header["recipe"] = RECIPE.to_dict()
    assert diagnose(run) == diagnose(run, RECIPE)


def test_the_command(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from fusedopt.cli.app import app

    RECIPE.save(tmp_path / "recipe.yaml")
    (tmp_path / "train.log").write_text(MESSAGES["2.6"][0])
    arguments = ["diagnose", "--recipe", str(tmp_path / "recipe.yaml"), "--error", str(tmp_path / "train.log")]
    result = testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "per_device_train_batch_size: 8 -> 4" in result.output
    result = testing.CliRunner().invoke(app, [*arguments, "--apply", "2", "--output", str(tmp_path / "better.yaml")])
    assert Recipe.load(tmp_path / "better.yaml").gradient_checkpointing
    result = testing.CliRunner().invoke(app, [*arguments, "--apply", "99", "-o", str(tmp_path / "x.yaml")])
    assert result.exit_code == 2
    assert "--apply 99 is none of" in result.output
