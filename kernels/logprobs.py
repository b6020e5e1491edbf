"""Log-probabilities and ranks of sampled tokens, with one program for every batch size.

The ops are plain functions. Called as they are they run eager; `compiled` gives one that compiles
at its first call and then takes any batch size without compiling again, 1 included. After
vllm/v1/sample/ops/logprobs.py and `Sampler.gather_logprobs` in vLLM.

Our sampler calls them eager. Compiled by Inductor for a CPU (torch 2.13, one core, k of 5), the
first call of `gather_logprobs` took 20 s, 4 s with Inductor's own cache filled, against 1 ms:

    batch, vocabulary   eager      compiled
    1, 32000            0.11 ms    0.13 ms
    8, 32000            0.62 ms    0.55 ms
    64, 128256          24.6 ms    20.0 ms

At best it is repaid after a thousand steps of 64 sequences, and with a single sequence never. The
count alone gains more (8.0 to 1.7 ms for 64 rows of 128256), for those who need only ranks. On a
GPU it has not been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels.library import define_op

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredLogprobs:
    """What `gather_logprobs` returns, one row for each of the batch's B rows of logits.

    `token_logprobs` `[B]` and `token_ranks` `[B]` (int64) are those of the given tokens. `top_ids`
    `[B, k]` (int64) are the most probable tokens, best first, and `top_logprobs` `[B, k]` theirs.
    Log-probabilities are natural logarithms, float32 (float64 for logits of float64).
    """

    token_logprobs: torch.Tensor
    token_ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def batched_count_greater_than(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many elements of each row of `x` are greater than the row's value, or equal to it.

    `x` is `[batch, vocab]` and `values` `[batch, 1]`, of any one dtype; the result is `[batch]`
    (int64). With a value that is itself an element of its row this is the element's rank: 1 is the
    best, and equal elements share the worst of their places, as vLLM counts.

    A NaN is neither greater nor equal: in `x` it is not counted, and the count for a value of NaN
    is 0. All but NaN count for a value of -inf.

    Raises `VllmcError` (`bad-batch`) for an empty batch and for other shapes.

    On a GPU it is the op `vllmc::batched_count_greater_than`, a kernel of ours also where this
    function is compiled; on a CPU Inductor makes one loop of what the op does.
    """
    _require_batch("batched_count_greater_than", x, values)
    if x.is_cuda:
        return torch.ops.vllmc.batched_count_greater_than(x, values)
    return _count(x, values)


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, count: int) -> GatheredLogprobs:
    """The log-probability and rank of one token in each row, and the `count` most probable tokens.

    `logits` is `[batch, vocab]` (floating), `token_ids` `[batch]` (int64, below vocab); `count` is
    at least 0, and all tokens are returned where there are fewer.

    Ranks are counted on the logits (`batched_count_greater_than`): these are compared without
    rounding, while the logarithms of logits that differ may round to one number. Log-probabilities
    are NaN in a row with a NaN or a +inf, or of nothing but -inf; a NaN comes first in `top_ids`.

    Raises `VllmcError` (`bad-batch`) for an empty batch and for other shapes.
    """
    _require_batch("gather_logprobs", logits, token_ids)
    ids = token_ids.view(-1, 1)
    ranks = batched_count_greater_than(logits, logits.gather(1, ids))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = logits.log_softmax(dim=-1, dtype=dtype)
    top_ids = logits.topk(min(count, logits.shape[1]), dim=-1).indices
    return GatheredLogprobs(
        token_logprobs=logprobs.gather(1, ids)[:, 0],
        token_ranks=ranks,
        top_ids=top_ids,
        top_logprobs=logprobs.gather(1, top_ids),
    )


def compiled(
    op: Callable[..., _R], *, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., _R]:
    """`op`, one of this module, compiled by `backend` at the first call, for every batch size.

    Tensors are given by position. Those that are not contiguous are copied, so that their layout
    compiles nothing again; another vocabulary, dtype, device or `count` does. The caller's tensors
    keep no mark.
    """
    # Dynamo takes a second to import, which those who run the ops eager do not pay.
    from vllmc.core.torch_compat.unbacked import mark_unbacked_size

    program = torch.compile(op, fullgraph=True, backend=backend)

    def call(rows: torch.Tensor, others: torch.Tensor, *rest: object) -> _R:
        # Before Dynamo: compiled code would meet an empty batch with a failed guard.
        _require_batch(op.__name__, rows, others)
        # A single row is contiguous at any stride, and Dynamo guards on the stride.
        batch, vocab = rows.shape
        dense = rows.contiguous().as_strided((batch, vocab), (vocab, 1)).detach()
        column = others.contiguous().as_strided((batch, 1), (1, 1)).detach()
        for tensor in (dense, column):
            mark_unbacked_size(tensor, 0, low=1)
        return program(dense, column, *rest)

    return call


def _count(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    # Summed in 32 bits: on a CPU a third of the time of a sum in 64.
    return (x >= values.view(-1, 1)).sum(dim=-1, dtype=torch.int32).long()


define_op(
    "batched_count_greater_than(Tensor x, Tensor values) -> Tensor",
    cpu=_count,
    fake=lambda x, _values: torch.empty(x.shape[0], dtype=torch.int64, device=x.device),
    cuda="vllmc.kernels.triton.logprobs:batched_count_greater_than",
)


def _require_batch(op: str, rows: torch.Tensor, others: torch.Tensor) -> None:
    """That there is a row at all, and one element of `others` for each."""
    if torch.compiler.is_compiling():
        # Not eager as well: the check imports sympy, which a warm start does without.
        torch._check(rows.shape[0] >= 1)
        torch._check(others.numel() == rows.shape[0])
    elif not (rows.dim() == 2 and 0 < rows.shape[0] == others.numel()):
        shapes = [list(rows.shape), list(others.shape)]
        raise VllmcError(
            "bad-batch",
            f"{op} was given shapes {shapes[0]} and {shapes[1]}, not [batch, vocab] with a batch "
            "of at least 1 and one element for each of its rows",
            context={"op": op, "shapes": shapes},
            hint="leave out the call where there are no rows, and give both tensors the same rows",
        )
