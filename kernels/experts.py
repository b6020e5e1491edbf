"""The experts of a mixture layer, as the op `vllmc::fused_moe` finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """E experts, each `down @ gate(up @ x)`, for hidden states of size H.

    `up` `[E, N, H]` and `up_bias` `[E, N]`; `gate` takes `[S, N]` to `[S, I]`, row by row; `down`
    `[E, H, I]` and `down_bias` `[E, H]`. All tensors are of one floating dtype; strides are free.
    `gated_silu` says that N is 2 I, and `gate` is `silu(first half) * second half`: a kernel may
    then do it itself.
    """

    up: torch.Tensor
    down: torch.Tensor
    gate: Callable[[torch.Tensor], torch.Tensor]
    gated_silu: bool
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
