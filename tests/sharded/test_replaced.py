"""Between two steps anybody may replace what a DTensor holds: each step looks at all of it anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from sharded.models import EIGHT_BIT, assert_same_whole, full_params, params_of, placed, set_grads, step_both, whole
from sharded.ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fusedopt

SHAPES = ((66, 128), (5, 192), (31,))
WORLD = 2


def _optimizers(**kwargs: Any) -> tuple[fusedopt.AdamW, fusedopt.AdamW]:
    """Of DTensors, stepped by the core alone, and of the same parameters as plain tensors; both have stepped."""
    mesh = init_device_mesh("cpu", (WORLD,))
    full = full_params(SHAPES)
    options = {"lr": 1e-2, "backend": "cpu", **EIGHT_BIT, **kwargs}
    ours = fusedopt.AdamW([torch.nn.Parameter(placed(p, mesh, [Shard(0)])) for p in full], **options)
    theirs = fusedopt.AdamW([torch.nn.Parameter(p.clone()) for p in full], **options)
    step_both(ours, theirs, range(2))
    return ours, theirs


def _copy(tensor: Any) -> DTensor:
    """Another DTensor of the same numbers, with another spec and other memory."""
    local = tensor.to_local().clone()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _parameters(ours: torch.optim.Optimizer) -> None:
    for param in params_of(ours):
        torch.utils.swap_tensors(param, torch.nn.Parameter(_copy(param.detach())))  # as modules do that are converted


def _local_tensors(ours: torch.optim.Optimizer) -> None:
    for param in params_of(ours):
        param._local_tensor = param._local_tensor.detach().clone()  # as FSDP2 does after a module has been moved


def _states(ours: torch.optim.Optimizer) -> None:
    for held in ours.state.values():
        held.update({key: _copy(value) for key, value in held.items() if isinstance(value, DTensor)})


def _local_states(ours: torch.optim.Optimizer) -> None:
    for held in ours.state.values():
        for value in held.values():
            if isinstance(value, DTensor):
                value._local_tensor = value._local_tensor.clone()


def _placements(ours: torch.optim.Optimizer) -> None:
    for param in params_of(ours):
        mesh, held = param.device_mesh, ours.state[param]
        held.update({k: placed(whole(v), mesh, [Replicate()]) for k, v in held.items() if isinstance(v, DTensor)})
        torch.utils.swap_tensors(param, torch.nn.Parameter(placed(whole(param), mesh, [Replicate()])))


def _all(ours: torch.optim.Optimizer) -> None:
    ours.load_state_dict(ours.state_dict())


CHANGES = (_parameters, _local_tensors, _states, _local_states, _placements, _all)


def _held(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What is held here of parameters and their states."""
    values = [value for param in params_of(optimizer) for value in (param, *optimizer.state[param].values())]
    return [value._local_tensor.detach() for value in values if isinstance(value, DTensor)]


def _replaced(rank: int, world: int, change: str) -> None:
    ours, theirs = _optimizers()
    changed: Callable[..., None] = next(each for each in CHANGES if each.__name__ == change)
    before = _held(ours)
    kept = [tensor.clone() for tensor in before]
    changed(ours)
    now = {tensor.data_ptr() for tensor in _held(ours)}
    step_both(ours, theirs, range(2, 4))
    assert_same_whole(ours, theirs)
    replaced = [(old, copy) for old, copy in zip(before, kept) if old.data_ptr() not in now]
    assert len(replaced) >= len(SHAPES)
    for i, (old, copy) in enumerate(replaced):
        assert_same_bits(old, copy, f"what was replaced, {i}")


@pytest.mark.parametrize("change", [each.__name__ for each in CHANGES])
def test_what_is_replaced_is_stepped(ranks: Ranks, change: str) -> None:
    ranks(WORLD, _replaced, change=change)


def _gradients(rank: int, world: int) -> None:
    """Those of the same spec, of an equal one, and of other placements, one after the other for each parameter."""
    ours, theirs = _optimizers()
    for step in range(2, 6):
        set_grads(ours, step)
        set_grads(theirs, step)
        for i, param in enumerate(params_of(ours)):
            kind = (i + step) % 3
            if kind == 1:
                param.grad = _copy(param.grad)
            elif kind == 2:
                param.grad = param.grad.redistribute(param.device_mesh, [Replicate()])
        ours.step()
        theirs.step()
    assert_same_whole(ours, theirs)


def test_gradients_lie_anywhere(ranks: Ranks) -> None:
    ranks(WORLD, _gradients)


def _partial_gradients(rank: int, world: int) -> None:
    """Of replicas, unsummed on one step and summed on the next: both look alike here."""
    mesh = init_device_mesh("cpu", (WORLD,))
    param = torch.nn.Parameter(placed(full_params(SHAPES)[0], mesh, [Replicate()]))
    twin = torch.nn.Parameter(full_params(SHAPES)[0])
    options = {"lr": 1e-2, "backend": "cpu", **EIGHT_BIT}
    ours, theirs = fusedopt.AdamW([param], **options), fusedopt.AdamW([twin], **options)
    for step in range(4):
        set_grads(theirs, step)
        if step % 2:
            param.grad = placed(twin.grad, mesh, [Replicate()])
        else:
            part = twin.grad * (0.25 if rank == 0 else 0.75)
            param.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
            twin.grad = twin.grad * 0.25 + twin.grad * 0.75
        ours.step()
        theirs.step()
    assert_same_whole(ours, theirs)


def test_gradients_may_be_unsummed(ranks: Ranks) -> None:
    ranks(WORLD, _partial_gradients)


def _another_mesh(rank: int, world: int) -> None:
    """The same objects, spread over a mesh that the optimizer has never met: the norm is that of all of them."""
    ours, theirs = _optimizers(max_grad_norm=0.5)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("one", "all"))
    for param in params_of(ours):
        held = ours.state[param]
        held.update({k: placed(whole(v), mesh, [Replicate()] * 2) for k, v in held.items() if isinstance(v, DTensor)})
        torch.utils.swap_tensors(param, torch.nn.Parameter(placed(whole(param), mesh, [Replicate()] * 2)))
    step_both(ours, theirs, range(2, 4))
    assert ours.last_grad_norm.item() == theirs.last_grad_norm.item() > 0.5


def test_parameters_may_move_to_another_mesh(ranks: Ranks) -> None:
    ranks(WORLD, _another_mesh)


def _versions(rank: int, world: int) -> None:
    ours, _ = _optimizers()
    set_grads(ours, 2)
    held = [each for param in params_of(ours) for each in (param, param._local_tensor)]
    before = [tensor._version for tensor in held]
    ours.step()
    assert [tensor._version for tensor in held] == [version + 1 for version in before]


def test_versions_of_both_are_counted_once(ranks: Ranks) -> None:
    """Of a DTensor and of what it holds, which autograd counts apart."""
    ranks(WORLD, _versions)
