"""Transformers by size: the shapes of their weights, without memory."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """What activations depend on.

    Attributes:
        hidden: Width of the residual stream.
        layers: Blocks.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        inner: Width inside of the feed-forward part.
        vocabulary: Tokens that are predicted; 0 if none are.
        gated: Whether the feed-forward part has a gate, as Llama's.
        written_out: Whether its activation is computed by several operators, each of which keeps what it reads.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    gated: bool = True
    written_out: bool = False

    @property
    def inner_tensors(self) -> int:
        """Tensors of the inner width that a block keeps for the backward pass."""
        return 4 if self.gated else 5 if self.written_out else 2

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads


# Published shapes, as facts: GPT-2 and GPT-3 (arXiv:2005.14165), Llama (arXiv:2302.13971, 2307.09288, 2407.21783).
_KNOWN = {
    "125M": Shape(768, 12, 12, 12, 3072, 50257, gated=False),
    "350M": Shape(1024, 24, 16, 16, 4096, 50257, gated=False),
    "1.3B": Shape(2048, 24, 32, 32, 8192, 50257, gated=False),
    "2.7B": Shape(2560, 32, 32, 32, 10240, 50257, gated=False),
    "1B": Shape(2048, 16, 32, 8, 8192, 128256),
    "3B": Shape(3072, 28, 24, 8, 8192, 128256),
    "7B": Shape(4096, 32, 32, 32, 11008, 32000),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256),
    "13B": Shape(5120, 40, 40, 40, 13824, 32000),
    "70B": Shape(8192, 80, 64, 8, 28672, 32000),
    "405B": Shape(16384, 126, 128, 8, 53248, 128256),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MBT])", re.IGNORECASE)
_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}


def shape_of_size(size: str) -> Shape:
    """The shape of a language model of about a size: a published one, or one like Llama's.

    Args:
        size: Such as "7B", "125M" or "1.5B".

    Returns:
        The shape.

    Raises:
        ValueError: It is no size, or none that language models of this kind have.
    """
    name = size.strip().upper()
    if name in _KNOWN:
        return _KNOWN[name]
    match = _SIZE.fullmatch(name)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"size {size!r} is no number of parameters; write for example 7B or 350M")
    wanted = float(match[1]) * _UNITS[match[2]]
    # A block has 4 h^2 in attention and 3 h inner = 8 h^2 in the rest; there are about h / 128 of them.
    candidates = [
        _like_llama(hidden, round(hidden / 128) + more)
        for hidden in range(128, 32769, 128)
        for more in range(-8, 9)
        if round(hidden / 128) + more >= 1
    ]
    found = min(candidates, key=lambda shape: abs(parameters_of(shape) - wanted))
    if abs(parameters_of(found) - wanted) > wanted / 3:
        raise ValueError(
            f"size {size!r} is far from any shape that is known here, the nearest of which has "
            f"{parameters_of(found):,} parameters; pass the model itself"
        )
    return found


def _like_llama(hidden: int, layers: int) -> Shape:
    heads = hidden // 128 if hidden >= 1024 else hidden // 64
    inner = -(-(8 * hidden // 3) // 256) * 256
    return Shape(hidden, layers, heads, heads, inner, 32000)


def parameters_of(shape: Shape) -> int:
    """How many parameters a model of a shape has."""
    h = shape.hidden
    matrices = 2 * h * h + 2 * h * shape.kv_width + (3 if shape.gated else 2) * h * shape.inner
    return shape.layers * (matrices + 2 * h) + 2 * shape.vocabulary * h + h


class Skeleton(nn.Module):
    """The weights of a language model, on the meta device, under the usual names.

    Args:
        shape: Its shape.
        dtype: Of the weights.
        lora_rank: The rank of adapters at every matrix of the blocks, which then are all that requires gradients.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, lora_rank: int | None = None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": "meta", "dtype": dtype}
        h, kv = shape.hidden, shape.kv_width
        self.embed_tokens = nn.Embedding(shape.vocabulary, h, **kind)
        self.layers = nn.ModuleList()
        sizes = {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h)}
        sizes |= {"up_proj": (h, shape.inner), "down_proj": (shape.inner, h)}
        sizes |= {"gate_proj": (h, shape.inner)} if shape.gated else {}
        for _ in range(shape.layers):
            block = nn.ModuleDict({name: nn.Linear(*size, bias=False, **kind) for name, size in sizes.items()})
            block.update({name: nn.RMSNorm(h, **kind) for name in ("input_layernorm", "post_attention_layernorm")})
            self.layers.append(block)
        self.norm = nn.RMSNorm(h, **kind)
        self.lm_head = nn.Linear(h, shape.vocabulary, bias=False, **kind)
        if lora_rank is not None:
            self.requires_grad_(False)
            kind["dtype"] = torch.float32  # as PEFT keeps them
            for adapted in self.layers:
                for name, (wide, high) in sizes.items():
                    adapted.add_module(f"{name}_lora_A", nn.Linear(wide, lora_rank, bias=False, **kind))
                    adapted.add_module(f"{name}_lora_B", nn.Linear(lora_rank, high, bias=False, **kind))


@functools.lru_cache(maxsize=4)
def skeleton(shape: Shape, dtype: torch.dtype, lora_rank: int | None) -> Skeleton:
    """A `Skeleton`, made once."""
    return Skeleton(shape, dtype, lora_rank)


def shape_of_model(model: nn.Module) -> Shape | None:
    """The shape of a transformer of transformers', by its config; None for any other module.

    Of a model with several parts, such as one that reads pictures, it is the shape of the part for text. One with an
    encoder and a decoder is of another kind: its blocks attend twice.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None

    def value(*names: str) -> int | None:
        return next((int(v) for name in names if (v := getattr(config, name, None)) is not None), None)

    hidden, layers = value("hidden_size", "n_embd"), value("num_hidden_layers", "n_layer")
    heads = value("num_attention_heads", "n_head")
    if hidden is None or layers is None or heads is None:
        return None
    head: Any = getattr(model, "get_output_embeddings", lambda: None)
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=value("num_key_value_heads") or heads,
        inner=value("intermediate_size", "n_inner") or 4 * hidden,
        vocabulary=(value("vocab_size") or 0) if head() is not None else 0,
        gated=any("gate_proj" in name for name, _ in model.named_parameters()),
        written_out=getattr(config, "activation_function", getattr(config, "hidden_act", "")) == "gelu_new",
    )
