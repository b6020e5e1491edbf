"""What a failed capture of a CUDA graph leaves behind in torch."""

from __future__ import annotations

import contextlib

import torch


def end_capture(device: int, pool: tuple[int, int]) -> None:
    """Tells torch's allocator that nothing is captured into `pool`, whether it knows that or not.

    Where a capture fails, torch 2.11 forgets to (pytorch/pytorch#180395). It then refuses to empty
    its cache, and each capture begins with that.
    """
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
