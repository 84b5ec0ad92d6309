"""How frameworks spread parameters over processes: FSDP2, replicas of it, tensor parallelism, both, and none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sharded.models import placed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard


class Holder(nn.Module):
    def __init__(self, params: list[Any]) -> None:
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(param) for param in params)


def tensor_parallel(dim: int) -> Callable[..., list[Any]]:
    def layout(world: int, full: list[Tensor]) -> list[Any]:
        mesh = init_device_mesh("cpu", (world,))
        return [nn.Parameter(placed(p, mesh, [Shard(dim) if p.dim() > dim else Replicate()])) for p in full]

    return layout


def fsdp(world: int, full: list[Tensor]) -> list[Any]:
    return list(fully_shard(Holder(full)).parameters())


def hybrid(world: int, full: list[Tensor]) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    return list(fully_shard(Holder(full), mesh=mesh).parameters())


def fsdp_andtensor_parallel(world: int, full: list[Tensor]) -> list[Any]:
    """Columns and rows in turn; FSDP2 takes only even shards of what is cut along its first dimension already."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    params: list[Any] = []
    for i, param in enumerate(full):
        cut = param.dim() - 1 if i % 2 or param.shape[0] % world else 0
        params.append(placed(param, mesh["tensor"], [Shard(cut)]) if param.dim() > 1 else param)
    return list(fully_shard(Holder(params), mesh=mesh["data"]).parameters())


def plain(world: int, full: list[Tensor]) -> list[Any]:
    return [nn.Parameter(param) for param in full]


LAYOUTS: dict[str, tuple[int, Callable[..., list[Any]]]] = {
    "FSDP2": (3, fsdp),
    "HSDP": (4, hybrid),
    "TP row": (2, tensor_parallel(1)),
    "TP column": (3, tensor_parallel(0)),
    "FSDP2 + TP": (4, fsdp_andtensor_parallel),
    "DDP": (2, plain),
    "ZeRO-1": (2, plain),
}
