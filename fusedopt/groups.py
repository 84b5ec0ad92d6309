"""Param groups: which parameters of a model decay, and how fast each layer learns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import checks

# A subclass may have any name, so these are looked up by type; everything else is known by what it is called.
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
# The weights of these are matrices, and those of an Embedding a table, whatever the module is called.
_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_LISTS = (nn.ModuleList, nn.Sequential)

# The parts of a name, split where letters end and where a word in CamelCase begins: LlamaRMSNorm is Llama, RMS, Norm.
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_BIAS = re.compile(r"[a-z]*bias(es)?")  # qbias
# layernorm, norms, normalization; not normal, normalized, which say what something is, nor what undoes a norm
_NORM = re.compile(r"(?!denorm|unnorm)[a-z]*norm(s|ali[sz]ation|ali[sz]er?)?|ln|bn|gn|grn")
# A class called LayerNormLinear is a Linear; one called ConvNorm is a norm.
_MATRIX = re.compile(r"linear|mlp|conv|attention|embedding|rnn|lstm|gru|cell")
_SHOWN = 8


@dataclass
class _Parameter:
    """A parameter under all of its names, in the order of the model; the first is the one it goes by."""

    value: nn.Parameter
    names: list[str] = field(default_factory=list)
    decays: bool = True


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    no_decay: str | Iterable[str] = (),
    *,
    lr: float | Tensor | None = None,
    layer_decay: float | None = None,
    layers: str | None = None,
) -> list[dict[str, Any]]:
    """Sorts the parameters of a model into param groups, for any optimizer of torch or of this package.

    There are two groups: what decays, with ``weight_decay``, and what does not, with 0. Names are read by their parts:
    they are split at underscores, dots and digits, and names of classes at capitals, too. These do not decay:

    - the parameters that a normalization holds itself. It is one of torch's (LayerNorm, RMSNorm, GroupNorm,
      BatchNorm, InstanceNorm), or a module whose class, or whose own name in the model, has a part such as "norm",
      "layernorm", "normalization", "ln" or "bn": ``LlamaRMSNorm``, ``post_attention_layernorm``, ``ln_1``. Parts such
      as "normal" and "denorm" do not say so. What modules inside of it hold is judged by their own class and name: a
      block called ``norm_attn_norm`` or ``PreNorm`` is mostly matrices. The weights of torch's Linear, convolutions,
      RNNs and MultiheadAttention decay whatever the module is called, and those of a class called ``LayerNormLinear``.
    - every parameter whose own name has a part "bias" (``bias_ih_l0``, ``in_proj_bias``, ``q_bias``,
      ``relative_position_bias_table``) or one that says norm (``norm_weight``).
    - what a module other than a Linear or convolution holds itself, if its own name in the model has a part "bias":
      T5's ``relative_attention_bias``, an Embedding, is a table of biases.
    - every parameter whose full name contains one of the strings of ``no_decay``.

    An Embedding is none of these otherwise: it decays unless ``no_decay`` names it. So do other parameters of one
    dimension, such as the scale of a layer, and both parameters of a weight norm, the magnitude being the size of the
    weight. A parameter in a ParameterList or under a parametrization goes by the name that it has in the module that
    holds the list or is parametrized.

    transformers' Trainer leaves out torch's LayerNorm, what has "bias", "layernorm" or "rmsnorm" anywhere in its full
    name, and modules called "norm" or "..._norm"; it lets norms of other names decay, such as BatchNorm called ``bn1``
    or ``norm1``. timm leaves out whatever has one dimension, a name that ends with ".bias", and what the model lists.

    Parameters with requires_grad=False are left out. A shared (tied) parameter appears once, under its first name,
    and does not decay if any of its names or modules says so. Empty groups are left out.

    With ``layer_decay``, layers near the input learn more slowly. Layers, what is before them and what is after
    them have two groups each. Of L layers:

    - layer i, counted from 0, has ``lr * layer_decay ** (L - 1 - i)``,
    - what is registered before the layers (embeddings) has ``lr * layer_decay ** L``,
    - what is registered after them (final norm, head) has ``lr``, as the last layer.

    "Before" and "after" are in the order of ``model.named_parameters()``, in which a module's own parameters come
    before those of its children. Discriminative fine-tuning is by Howard and Ruder (ULMFiT, arXiv:1801.06146), one
    factor for all layers by Clark et al. (ELECTRA, arXiv:2003.10555) and BEiT (arXiv:2106.08254). Their code
    also decays from the head to the last layer, BEiT's once and ELECTRA's twice: for that, multiply the lr of all
    groups but the head's.

    Args:
        model: Any module.
        weight_decay: Of the parameters that decay, >= 0.
        no_decay: Parts of names of parameters that are not to decay.
        lr: The learning rate of all groups, or with ``layer_decay`` that of the last layer. Each group has a copy
            of a one-element tensor. None leaves it to the optimizer.
        layer_decay: What the learning rate is multiplied by for each layer towards the input, in (0, 1]. Needs ``lr``.
        layers: The name of the ModuleList or Sequential whose entries are the layers, such as "transformer.h". By
            default it is the longest one of the model that has parameters. Every entry counts as a layer, also one
            that is frozen or has no parameters.

    Returns:
        Groups whose "params" are lists of (name, parameter) pairs, with "weight_decay" and, where ``lr`` is given,
        "lr"; from the input to the output, what decays before what does not.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A number is out of its range, a string of ``no_decay`` is in no name, or the layers cannot be told.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}; pass a torch.nn.Module")
    weight_decay = checks.nonnegative("weight_decay", weight_decay)
    if lr is not None:
        number = checks.nonnegative("lr", lr)
        lr = lr.detach() if isinstance(lr, Tensor) else number
    params = _parameters(model)
    _apply_no_decay(params, no_decay)
    depths, count = _depths(model, params, lr, layer_decay, layers)

    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    # Sorting is stable: within a group, names stay in the order of the model.
    for param, depth in sorted(zip(params, depths), key=lambda pair: (pair[1], not pair[0].decays)):
        if not param.value.requires_grad:
            continue
        group = groups.setdefault((depth, param.decays), {"params": []})
        group["params"].append((param.names[0], param.value))
        group["weight_decay"] = weight_decay if param.decays else 0.0
        if lr is not None:
            factor = 1.0 if layer_decay is None else float(layer_decay) ** max(count - depth, 0)
            group.setdefault("lr", lr * factor)
    return list(groups.values())


def _parameters(model: nn.Module) -> list[_Parameter]:
    """Every parameter once, in the order of ``model.named_parameters()``, frozen ones too."""
    found: dict[nn.Parameter, _Parameter] = {}
    # Duplicates are wanted: each further name of a shared parameter may be the one that says "no decay".
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        holder, own_name, given = _holder(modules, path)
        for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
            param = found.setdefault(value, _Parameter(value))
            param.names.append(f"{path}.{name}" if path else name)
            param.decays = param.decays and not _is_bias_or_norm(holder, own_name, f"{given}.{name}")
    return list(found.values())


def _holder(modules: dict[str, nn.Module], path: str) -> tuple[nn.Module, str, str]:
    """The module that the parameters of the one at `path` belong to, its own name, and theirs in there if it has one.

    A parametrization and a ParameterList are modules themselves, in which parameters have names such as "original".
    """
    module, given = modules[path], ""
    parent, _, name = f".{path}".rpartition(".")
    if isinstance(module, ParametrizationList) and parent.endswith(".parametrizations"):
        path, given = parent[1:].removesuffix("parametrizations").removesuffix("."), name
    elif isinstance(module, (nn.ParameterList, nn.ParameterDict)) and path:
        path, given = parent[1:], name
    parent, _, name = f".{path}".rpartition(".")
    if path and isinstance(modules[parent[1:]], nn.ModuleList):  # norms.0 has no name of its own but its list's
        name = parent.rpartition(".")[2]
    return modules[path], name, given


def _is_bias_or_norm(module: nn.Module, own_name: str, name: str) -> bool:
    """Whether the parameter of that name, which a module holds itself, is a bias or belongs to a norm."""
    if isinstance(module, _NORMS) or _has(_BIAS, name) or _says_norm(name):
        return True
    if isinstance(module, _MATRICES):
        return False
    if isinstance(module, nn.Embedding):
        return _has(_BIAS, own_name)
    class_name = type(module).__name__
    if _has(_NORM, class_name):
        return _says_norm(class_name)
    return _has(_NORM, own_name) or _has(_BIAS, own_name)


def _parts(name: str) -> list[str]:
    return [part.lower() for part in _PART.findall(name)]


def _has(word: re.Pattern[str], name: str) -> bool:
    return any(word.fullmatch(part) for part in _parts(name))


def _says_norm(name: str) -> bool:
    """Whether a name has a part that says norm, and none behind it that says matrix."""
    said = False
    for part in _parts(name):
        said = _NORM.fullmatch(part) is not None or (said and _MATRIX.fullmatch(part) is None)
    return said


def _apply_no_decay(params: list[_Parameter], no_decay: Any) -> None:
    """Marks what ``no_decay`` names; a string that names nothing is taken for a misspelling."""
    if isinstance(no_decay, str):
        no_decay = [no_decay]
    elif not isinstance(no_decay, Iterable):
        raise TypeError(
            f"no_decay={no_decay!r} is a {type(no_decay).__name__}; pass a string or strings, parts of names"
        )
    for part in no_decay:
        if not isinstance(part, str):
            raise TypeError(f"no_decay has {part!r}, a {type(part).__name__}; pass strings, parts of parameters' names")
        if not part:
            raise ValueError("no_decay has '', which every name contains; pass weight_decay=0 to decay nothing")
        matches = [param for param in params if any(part in name for name in param.names)]
        if not matches:
            names = [name for param in params for name in param.names]
            raise ValueError(
                f"no_decay has {part!r}, which is in no parameter's name{checks.closest(part, names)}; "
                f"pass a part of a name, of {_some(names)}"
            )
        for param in matches:
            param.decays = False


def _depths(
    model: nn.Module, params: list[_Parameter], lr: float | Tensor | None, layer_decay: Any, layers: Any
) -> tuple[list[int], int]:
    """Each parameter's depth and the number L of layers: 0 before them, i + 1 in layer i, L + 1 after them."""
    if layer_decay is None:
        if layers is not None:
            raise ValueError(f"layers={layers!r} is only used with layer_decay; pass layer_decay too, or no layers")
        return [0] * len(params), 0
    factor = checks.number("layer_decay", layer_decay)
    if not 0 < factor <= 1:
        raise ValueError(f"layer_decay={factor!r} is outside (0, 1]; pass a number above 0, up to 1")
    if lr is None:
        raise ValueError(f"layer_decay={factor!r} has no lr to multiply; pass lr, the learning rate of the last layer")

    path, module = _longest_list(model) if layers is None else _named_list(model, layers)
    prefix = f"{path}." if path else ""
    # By key and not by named_children, which gives a layer that is listed twice only once.
    position = {name: i for i, name in enumerate(module._modules)}
    depths, after = [], 0
    for param in params:
        name = param.names[0]
        layer = position.get(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None
        if layer is not None:
            after = len(module) + 1
        depths.append(after if layer is None else layer + 1)
    if not after:
        raise ValueError(
            f"layers={path!r} has only parameters that are named elsewhere first; {_remedy(_lists(model))}"
        )
    return depths, len(module)


def _lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The lists of modules that may be the layers, under their first names."""
    return {path: m for path, m in model.named_modules() if isinstance(m, _LISTS) and any(True for _ in m.parameters())}


def _remedy(lists: Iterable[str]) -> str:
    if not lists:
        return "put the layers in a ModuleList, or leave layer_decay out"
    return f"pass as layers the name of a ModuleList or Sequential with parameters: {_some(lists)}"


def _named_list(model: nn.Module, layers: Any) -> tuple[str, nn.ModuleList | nn.Sequential]:
    if not isinstance(layers, str):
        raise TypeError(f"layers={layers!r} is a {type(layers).__name__}; pass the name of a ModuleList, a string")
    lists = _lists(model)
    module = dict(model.named_modules(remove_duplicate=False)).get(layers)
    for path, candidate in lists.items():
        if candidate is module:  # perhaps under another name; parameters go by their first
            return path, candidate
    what = "names no module" if module is None else f"names a {type(module).__name__}, no list with parameters"
    raise ValueError(f"layers={layers!r} {what}{checks.closest(layers, lists)}; {_remedy(lists)}")


def _longest_list(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    lists = _lists(model)
    if not lists:
        raise ValueError(f"layer_decay found no layers in a {type(model).__name__}; {_remedy(lists)}")
    most = max(len(module) for module in lists.values())
    longest = {path: module for path, module in lists.items() if len(module) == most}
    outer = next(iter(longest))
    # Two stacks of one length, or the experts of every block: a guess would give half of the model a wrong rate.
    # Lists inside of the layers are no other choice.
    if any(not path.startswith(f"{outer}." if outer else "") for path in longest if path != outer):
        raise ValueError(
            f"layer_decay found {len(longest)} longest lists of {most} modules: {_some(longest)}; "
            "pass as layers the name of the one that holds the layers"
        )
    return outer, longest[outer]


def _some(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
