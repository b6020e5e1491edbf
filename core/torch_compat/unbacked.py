"""Dimensions of real tensors that `torch.compile` is to know nothing of but their least size."""

from __future__ import annotations

import torch

from vllmc.core.torch_compat.minors import TORCH


def mark_unbacked_size(tensor: torch.Tensor, dim: int, *, low: int) -> None:
    """Has `tensor.shape[dim]`, at least `low`, compiled as an unbacked size.

    Code that is compiled for it is compiled once, 0 and 1 being sizes like any other. The mark
    stays on the tensor. torch 2.11 is not told `low`: there code states it, with `torch._check`.
    """
    TORCH.mark_unbacked_size(tensor, dim, low=low)
