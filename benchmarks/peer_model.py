"""The model of `vllm_peer.py`, which knows neither of the compilers that it is compared by.

A Llama's backbone as serving engines write it: tokens flattened, one projection for queries, keys
and values, norms that carry the residual, rotary embeddings from a table. Its attention is an op
that writes into what it is given, and does next to nothing: what is compared lies around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

HIDDEN: Final = 256
INTERMEDIATE: Final = 688
HEAD: Final = 32
HEADS: Final = HIDDEN // HEAD
KV_HEADS: Final = HEADS // 2
VOCABULARY: Final = 8192
MAX_TOKENS: Final = 2048
ATTENTION: Final = "peer::attention"

library = torch.library.Library("peer", "DEF")


def define_ops(name_type: type) -> None:
    """Defines the two ops, which take the name of their layer as a `name_type`."""
    for op in (attention, kv_update):
        op.__annotations__.update(
            dict.fromkeys(("query", "key", "value", "out"), Tensor),
            layer_name=name_type,
            **{"return": None if op is attention else Tensor},
        )
        schema = torch.library.infer_schema(op, mutates_args=("out",) if op is attention else ())
        library.define(op.__name__ + schema)
        library.impl(op.__name__, op, "CompositeExplicitAutograd")
    torch.library.register_fake(ATTENTION, lambda *_: None, lib=library)
    torch.library.register_fake(
        "peer::kv_update", lambda key, _: torch.empty_like(key), lib=library
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    layer_name: Any,  # noqa: ARG001
) -> None:
    """The query and a product of its key and its value, for each head."""
    grouped = (-1, KV_HEADS, HEADS // KV_HEADS, HEAD)
    key, value = (x.view(-1, KV_HEADS, 1, HEAD) for x in (key, value))
    torch.addcmul(query.view(grouped), key, value, out=out.view(grouped))


def kv_update(key: Tensor, layer_name: Any) -> Tensor:  # noqa: ARG001
    """The key, as an op that stores it for its layer would return it."""
    return key.clone()


class Norm(nn.Module):
    """A root mean square norm of what is added up so far."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(HIDDEN) / 10)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised sum, and the sum."""
        residual = residual + x
        scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
        return residual * scale * self.weight, residual


class Layer(nn.Module):
    """A decoder layer; with `updates` its keys go through an op that stays inside a piece."""

    def __init__(self, name: object, *, updates: bool) -> None:
        super().__init__()
        self.name = name
        self.updates = updates
        self.before, self.after = Norm(), Norm()
        self.qkv = nn.Linear(HIDDEN, HIDDEN + 2 * KV_HEADS * HEAD, bias=False)
        self.output = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(
        self, x: Tensor, residual: Tensor, table: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is to be added, and what it is to be added to."""
        x, residual = self.before(x, residual)
        kv_size = KV_HEADS * HEAD
        query, key, value = self.qkv(x).split([HIDDEN, kv_size, kv_size], dim=-1)
        angles = table.index_select(0, positions)
        query, key = rotated(query, angles), rotated(key, angles)
        if self.updates:
            key = torch.ops.peer.kv_update(key, self.name)
        out = torch.empty_like(query)
        torch.ops.peer.attention(query, key, value.contiguous(), out, self.name)
        x, residual = self.after(self.output(out), residual)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up), residual


class Llama(nn.Module):
    """A Llama without its last projection, whose layers' names are what `named` makes of them."""

    angles: Tensor

    def __init__(self, *, layers: int, named: Callable[[str], object], updates: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        names = (named(f"model.layers.{index}.self_attn.attn") for index in range(layers))
        self.layers = nn.ModuleList(Layer(name, updates=updates) for name in names)
        self.norm = Norm()
        steps = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        phases = torch.arange(MAX_TOKENS)[:, None] * steps
        self.register_buffer("angles", torch.cat((phases.cos(), phases.sin()), -1))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The hidden states of the tokens."""
        x = self.embed(ids)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, self.angles, positions)
        hidden: Tensor = self.norm(x, residual)[0]
        return hidden


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """The heads of `x`, turned by the angles of their tokens."""
    heads = x.view(x.shape[0], -1, HEAD)
    cosine, sine = angles.unsqueeze(1).chunk(2, dim=-1)
    left, right = heads.chunk(2, dim=-1)
    turned = torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
    return turned.view(x.shape)
