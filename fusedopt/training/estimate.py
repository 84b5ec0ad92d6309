"""`estimate`: the memory of a training, by kind and device, before there is any."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..engine.optimizer import CLASSES, FusedOptimizer
from ..offload.release import BUCKET_NUMEL
from ..offload.runtime import runtime_of
from ..optimizers.names import create_optimizer
from ..storage import masters
from ..storage.state import DTYPES, slots_of
from .evaluate import size
from .recipe import Recipe, a_recipe
from .shapes import Shape, shape_of_model, shape_of_size, skeleton

DISTRIBUTIONS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Estimate:
    """The memory of one device, the first of all, which has the most.

    Attributes:
        parameters: Of the whole model.
        trained: Those of them that are trained.
        devices: How many there are.
        distribution: "ddp" or "fsdp"; None for one device.
        device: Bytes on the device, by kind: weights, buffers, gradients, each state, masters, and what torch makes.
        host: Bytes in the host's memory, by kind; with step_device="cpu" also the copies of weights and gradients.
        disk: Bytes in files, by kind. A step of the optimizer reads them all, and writes them again.
        activations: Bytes of activations and logits, by a formula; None if the model's shape is not known.
        moved: Bytes that a step of the optimizer reads and writes on the device.
        transferred: Bytes that it sends between the host and the device.
    """

    parameters: int
    trained: int
    devices: int
    distribution: str | None
    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    activations: int | None = None
    moved: int = 0
    transferred: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device, activations included where they are known."""
        return sum(self.device.values()) + (self.activations or 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**vars(self), "total": self.total}

    def __str__(self) -> str:
        where = f"on each of {self.devices} devices ({self.distribution})" if self.devices > 1 else "on one device"
        rows = [*self.device.items(), ("activations", self.activations), ("total", self.total)]
        lines = [f"{self.parameters:,} parameters, {self.trained:,} of them trained, {where}"]
        for kind, held in rows:
            lines.append(f"  {kind:24} {'unknown' if held is None else size(held):>12}")
        for place, kinds in (("host", self.host), ("disk", self.disk)):
            lines += [f"  {f'{kind} ({place})':24} {size(held):>12}" for kind, held in kinds.items()]
        if self.transferred:
            lines.append(f"  {'moved by a step':24} {size(self.transferred):>12}")
        if self.disk:
            lines.append(f"  {'in and out of files':24} {size(2 * sum(self.disk.values())):>12}")
        return "\n".join(lines)


def estimate(
    model: nn.Module | str,
    recipe: Recipe,
    *,
    devices: int = 1,
    distribution: str | None = None,
    sequence_length: int | None = None,
) -> Estimate:
    """What a training takes on each device.

    Weights, gradients, states and masters are exact: the sizes of the tensors that will be made, decided by the same
    functions that make them. Activations follow a formula (docs/training/memory.md), with its error stated there.

    Args:
        model: A model, on any device, the meta device included; or a size such as "7B", for a language model of
            published shape or one like Llama's.
        recipe: What is trained how.
        devices: Over how many devices data is parallel.
        distribution: "ddp", which copies everything, or "fsdp" (FSDP2), which shards weights, gradients and states
            along the first dimension. Default: fsdp from two devices on.
        sequence_length: Tokens in a sequence; the recipe's by default.

    Returns:
        The estimate, of the device that has the most.

    Raises:
        ValueError: A number is out of range, or the recipe does not fit the model.
        TypeError: Something is of the wrong type.
    """
    a_recipe(recipe)
    devices = checks.count("devices", devices)
    length = recipe.sequence_length if sequence_length is None else sequence_length
    if length is not None:
        checks.count("sequence_length", length)
    distribution = checks.one_of("distribution", distribution or "fsdp", DISTRIBUTIONS)
    distribution = distribution if devices > 1 else None
    shape: Shape | None
    if isinstance(model, str):
        shape = shape_of_size(model)
        model = skeleton(shape, DTYPES[recipe.weights_dtype], recipe.lora_rank)
    else:
        recipe.check_model(model)
        shape = shape_of_model(model)
    shards = devices if distribution == "fsdp" else 1
    optimizer = create_optimizer(recipe.optimizer, recipe.groups(model), **recipe.optimizer_arguments)
    device = _held(model, optimizer, shards)
    states = {kind: size for kind, size in device.items() if kind not in ("weights", "buffers", "gradients")}
    weights_and_gradients = sum(_traffic(optimizer, shards))
    moved = 2 * sum(states.values()) + weights_and_gradients
    if recipe.release_gradients:
        device["gradients"] = min(device["gradients"], _released(optimizer, shards))
    place = _place_of_states(recipe)
    elsewhere = {} if place == "device" else {kind: device.pop(kind) for kind in states}
    # Those in files stay in the host's memory, mapped, if the model does.
    is_streamed = place == "host" or (place == "disk" and not _is_on_cpu(model))
    transferred = 2 * sum(elsewhere.values()) if is_streamed else 0
    if place == "stepped there":
        # Gradients go to the host and weights there and back; both have copies there, which are not released.
        elsewhere["pinned copies"] = weights_and_gradients // 3 * 2
        moved = transferred = weights_and_gradients
    device |= _made_by_torch(model, recipe, distribution, device["gradients"])
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        devices=devices,
        distribution=distribution,
        device={kind: size for kind, size in device.items() if size},
        host=elsewhere if place in ("host", "stepped there") else {},
        disk=elsewhere if place == "disk" else {},
        activations=None if shape is None or length is None else activation_bytes(shape, recipe, length),
        moved=moved,
        transferred=transferred,
    )


# ---- what is exact -----------------------------------------------------------------------------------


def _here(param: Tensor, shards: int) -> Tensor:
    """What the first device holds of a parameter: FSDP2 shards rows, the first shards having the most."""
    rows = () if param.dim() == 0 else (-(-param.shape[0] // shards), *param.shape[1:])
    return torch.empty(rows, dtype=param.dtype, device="meta")


def _members(optimizer: FusedOptimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield group, param


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(model: nn.Module, optimizer: FusedOptimizer, shards: int) -> dict[str, int]:
    """Bytes by kind."""
    held = {"weights": sum(_size(_here(param, shards)) for param in model.parameters())}
    held["buffers"] = sum(_size(buffer) for buffer in model.buffers())
    held["gradients"] = 0
    known: dict[Any, dict[str, int]] = {}  # a model has few shapes, in many blocks
    for group, param in _members(optimizer):
        key = (id(group), param.shape, param.dtype)
        if key not in known:
            known[key] = _of_one(optimizer, group, param, _here(param, shards))
        for kind, taken in known[key].items():
            held[kind] = held.get(kind, 0) + taken
    return held


def _of_one(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor, here: Tensor) -> dict[str, int]:
    sizes = {"gradients": _size(here)}
    for spec in optimizer.states_of(group, param):
        slots = slots_of(spec, group, param, here)
        sizes[spec.name] = sum(slot.shape.numel() * slot.dtype.itemsize for slot in slots)
    master = masters.slot_of(group, param, here)
    if master is not None:
        sizes[master.key] = master.shape.numel() * master.dtype.itemsize
    return sizes


def _traffic(optimizer: FusedOptimizer, shards: int) -> Iterator[int]:
    """Bytes of a parameter that a step reads and writes, and of its gradient, which it reads."""
    for _, param in _members(optimizer):
        yield 3 * _size(_here(param, shards))


def _released(optimizer: FusedOptimizer, shards: int) -> int:
    """Bytes of the gradients that there are at one time: a bucket that is almost full, and one more."""
    here = [_here(param, shards) for _, param in _members(optimizer)]
    largest = max((tensor.numel() for tensor in here), default=0)
    widest = max((tensor.element_size() for tensor in here), default=0)
    return (BUCKET_NUMEL - 1 + largest) * widest


def _place_of_states(recipe: Recipe) -> str:
    """Where states are: "device", "host", "disk", or "stepped there", on the host. "auto" is decided on a device."""
    options = recipe.resolved_options
    if options.get("step_device") is not None:
        return "stepped there"
    where = str(options.get("state_device"))
    return "disk" if where.startswith("disk:") else "host" if where == "cpu" else "device"


def _is_on_cpu(model: nn.Module) -> bool:
    return all(param.device.type == "cpu" and runtime_of(param) is None for param in model.parameters())


def takes_offload(name: str) -> bool:
    """Whether an optimizer's states can be kept in the host's memory."""
    return "state_device" in inspect.signature(CLASSES[name]).parameters


# ---- what is not -------------------------------------------------------------------------------------


def _made_by_torch(model: nn.Module, recipe: Recipe, distribution: str | None, gradients: int) -> dict[str, int]:
    """Bytes that torch adds: copies for autocast, DDP's buckets, layers that FSDP gathers."""
    made: dict[str, int] = {}
    trained = [param for param in model.parameters() if param.requires_grad]
    if recipe.precision != "float32" and distribution != "fsdp":
        # Autocast keeps a 16-bit copy of every matrix of float32 until the forward pass is over.
        made["autocast copies"] = sum(2 * p.numel() for p in trained if p.dim() > 1 and p.dtype == torch.float32)
    if distribution == "ddp":
        made["DDP buckets"] = gradients
    if distribution == "fsdp":
        width = DTYPES[recipe.precision].itemsize
        made["gathered layers"] = 2 * width * max(_blocks(model), default=0)  # one is computed, the next is fetched
    return made


def _blocks(model: nn.Module) -> Iterator[int]:
    """Parameters of what FSDP gathers at one time: each block, and the rest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    longest = max(lists, key=len, default=None)
    inside = 0
    for block in longest or ():
        count = sum(param.numel() for param in block.parameters())
        inside += count
        yield count
    yield sum(param.numel() for param in model.parameters()) - inside


def activation_bytes(shape: Shape, recipe: Recipe, sequence_length: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, and those of the logits.

    For T tokens on a device, hidden width h, keys' and values' width k, inner width f, V tokens to predict, and e bytes
    per number, with attention that does not keep its scores:

    - a block keeps T e (6 h + 2 k + n f): what norms, attention and matrices read, with queries, keys, values and the
      result of attention, and n tensors inside of the feed-forward part: 4 with a gate, 2 without one, 5 where GELU's
      tanh is written out ("gelu_new");
    - one with a gate, whose norms are RMSNorm in float32, keeps another 8 T h;
    - checkpointed, a block keeps its input, T e h, and one block at a time is computed again;
    - logits take T V (e + 8): themselves, in float32, and their softmax.

    Args:
        shape: Of the model.
        recipe: Batch size, precision and checkpointing.
        sequence_length: Tokens in a sequence.

    Returns:
        The bytes.
    """
    tokens = recipe.per_device_train_batch_size * sequence_length
    e = DTYPES[recipe.precision].itemsize
    h, k, f = shape.hidden, shape.kv_width, shape.inner
    block = e * (6 * h + 2 * k + shape.inner_tensors * f) + (8 * h if shape.gated else 0)
    kept = shape.layers * e * h + block if recipe.gradient_checkpointing else shape.layers * block
    return tokens * (kept + shape.vocabulary * (e + 8))
