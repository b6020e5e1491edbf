"""`vllmc::fused_moe`: a layer's mixture of experts as one op, which finds them by the layer's name.

After vLLM's `moe_forward` (vllm/model_executor/layers/fused_moe/layer.py): the experts' weights
are no arguments of the op and no inputs of the graph. The op stands inside a compiled piece, so
that a layer's name in it is what tells the pieces of equal layers apart, unless it is hoisted. Like
attention it has two overloads: `default` takes an opaque `LayerName`, `str` a string.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn.functional import grouped_mm

from vllmc.kernels.experts import Experts
from vllmc.kernels.forward_context import current_experts
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName
from vllmc.kernels.library import define_op

# `grouped_mm` goes through all experts, which costs more than a loop over a few that were hit.
_MANY_ROWS: Final = 16


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
    counts = torch.bincount(flat, minlength=experts.up.shape[0])
    inner = _products(hidden.index_select(0, tokens), experts.up, counts)
    if experts.up_bias is not None:
        inner += experts.up_bias[flat[rows]]
    outer = _products(experts.gate(inner), experts.down, counts)
    if experts.down_bias is not None:
        outer += experts.down_bias[flat[rows]]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weighted = outer * topk_weights.reshape(-1).index_select(0, rows).to(dtype)[:, None]
    # On a CPU rows are added one after the other.
    result = torch.zeros(hidden.shape, dtype=dtype).index_add_(0, tokens, weighted)
    return result.to(hidden.dtype)


def experts_named(layer_name: LayerName | str) -> Experts:
    """The experts of the layer, as the running step has them. Raises what `fused_moe` raises."""
    return current_experts(layer_name.value if isinstance(layer_name, LayerName) else layer_name)


def _products(rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows `[S, K]`, sorted by expert, times each one's part of `weights` `[E, N, K]`: `[S, N]`.

    `counts` `[E]` says how many rows each expert has.
    """
    matrices = weights.mT
    if rows.shape[0] >= _MANY_ROWS and _is_groupable(rows) and _is_groupable(matrices):
        return grouped_mm(rows, matrices, offs=counts.cumsum(0, dtype=torch.int32))
    result = rows.new_empty(rows.shape[0], weights.shape[1])
    hit = {expert: count for expert, count in enumerate(counts.tolist()) if count}
    parts = [*hit.values()]
    for expert, given, out in zip(hit, rows.split(parts), result.split(parts), strict=True):
        torch.mm(given, matrices[expert], out=out)
    return result


def _is_groupable(tensor: torch.Tensor) -> bool:
    """Whether torch's `grouped_mm` takes it: rows, or columns, that begin at 16 bytes each."""
    *_, rows, columns = tensor.stride()
    return (
        tensor.dtype != torch.float64
        and 1 in (rows, columns)
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride() if stride != 1)
    )


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
