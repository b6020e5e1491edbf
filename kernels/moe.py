"""`vllmc::fused_moe`: a layer's mixture of experts as one op, which finds them by the layer's name.

After vLLM's `moe_forward` (vllm/model_executor/layers/fused_moe/layer.py): the experts' weights
are no arguments of the op and no inputs of the graph. The op stands inside a compiled piece, so
that a layer's name in it is what tells the pieces of equal layers apart, unless it is hoisted. Like
attention it has two overloads: `default` takes an opaque `LayerName`, `str` a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from vllmc.kernels.experts import Experts
from vllmc.kernels.forward_context import current_experts
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName
from vllmc.kernels.library import define_op


def fused_moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer_name: LayerName | str,
) -> torch.Tensor:
    """The weighted sum of what each token's experts make of it.

    `hidden` `[T, H]`, of the experts' dtype; `topk_ids` `[T, k]` (int32 or int64) are the experts
    of each token, from 0, and `topk_weights` `[T, k]` (floating) what each of them counts. T may be
    0. Nothing is mutated. The result `[T, H]` is of `hidden`'s dtype.

    What a token's experts give is weighted and added up in float32 (float64 where `hidden` is), in
    the order of the experts, as Transformers' own loop over the experts does, and rounded once,
    which that does after each. Only experts that some token has are read.

    Raises `VllmcError`: `no-forward-context`, `unknown-layer`.
    """
    experts = experts_named(layer_name)
    flat = topk_ids.reshape(-1)
    rows = flat.argsort(stable=True)
    tokens = rows // topk_ids.shape[1]
    groups = _groups(flat, experts.up.shape[0])
    inner = _products(hidden[tokens], experts.up, groups)
    if experts.up_bias is not None:
        inner += experts.up_bias[flat[rows]]
    outer = _products(experts.gate(inner), experts.down, groups)
    if experts.down_bias is not None:
        outer += experts.down_bias[flat[rows]]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weighted = outer * topk_weights.reshape(-1)[rows, None].to(dtype)
    # On a CPU rows are added one after the other.
    result = torch.zeros(hidden.shape, dtype=dtype).index_add_(0, tokens, weighted)
    return result.to(hidden.dtype)


def experts_named(layer_name: LayerName | str) -> Experts:
    """The experts of the layer, as the running step has them. Raises what `fused_moe` raises."""
    return current_experts(layer_name.value if isinstance(layer_name, LayerName) else layer_name)


_Group: TypeAlias = tuple[int, int, int]
"""An expert, and the range of the sorted rows that are its own."""


def _groups(ids: torch.Tensor, experts: int) -> list[_Group]:
    groups, start = [], 0
    for expert, count in enumerate(torch.bincount(ids, minlength=experts).tolist()):
        if count:
            groups.append((expert, start, start + count))
            start += count
    return groups


def _products(rows: torch.Tensor, weights: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
    """Each group of `rows` `[S, K]`, times its expert's part of `weights` `[E, N, K]`: `[S, N]`."""
    result = rows.new_empty(rows.shape[0], weights.shape[1])
    for expert, start, end in groups:
        torch.mm(rows[start:end], weights[expert].t(), out=result[start:end])
    return result


def _fake(hidden: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _define(overload: str, name_type: str) -> None:
    define_op(
        f"fused_moe{overload}(Tensor hidden, Tensor topk_ids, Tensor topk_weights, "
        f"{name_type} layer_name) -> Tensor",
        cpu=fused_moe,
        fake=_fake,
        cuda="vllmc.kernels.triton.moe:fused_moe",
    )


_define("", LAYER_NAME_TYPE)
_define(".str", "str")
