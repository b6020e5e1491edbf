"""Dimensions of real tensors that `torch.compile` is to know nothing of but their least size."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch._dynamo.decorators import mark_unbacked

# torch 2.11 has no `min`: there compiled code states it, with `torch._check`.
_TAKES_MIN = "min" in inspect.signature(mark_unbacked).parameters


def supports_shape_ids(mark: Callable[..., object] = mark_unbacked) -> bool:
    """Whether dimensions can be marked as one size by a shape id: from torch 2.11 on."""
    return "shape_id" in inspect.signature(mark).parameters


def mark_unbacked_size(tensor: torch.Tensor, dim: int, *, low: int) -> None:
    """Has `tensor.shape[dim]`, at least `low`, compiled as an unbacked size.

    Code that is compiled for it is compiled once, 0 and 1 being sizes like any other. The mark
    stays on the tensor. Checked with torch 2.11 and 2.13.
    """
    if _TAKES_MIN:
        mark_unbacked(tensor, dim, min=low)
    else:
        mark_unbacked(tensor, dim)
