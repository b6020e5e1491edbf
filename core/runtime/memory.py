"""Whether a program's weights fit, asked before any is allocated."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import Layout
from vllmc.kernels.quant import LARGEST

_MEMINFO = Path("/proc/meminfo")


def weight_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """What the tensors that the program binds take while they are made, in bytes.

    Each counts once, a quantised weight as the one in `dtype` that it is made of.
    """
    return sum(
        math.prod(given.shape) * _itemsize(getattr(torch, given.dtype), dtype)
        for given in (*layout.inputs, *(t for site in layout.experts for t in site.tensors))
        if given.kind == "attribute"
    )


def _itemsize(dtype: torch.dtype, made_of: torch.dtype) -> int:
    return made_of.itemsize if dtype in LARGEST else dtype.itemsize


def free_bytes(device: str) -> int | None:
    """The memory that is free on `device`, in bytes; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) * 1024 if found else None


def require_memory(layout: Layout, device: str, dtype: torch.dtype) -> None:
    """Raises `VllmcError` (`not-enough-memory`) where the weights of a model in `dtype` do not fit.

    All of them are there before the first is quantised.
    """
    needed, free = weight_bytes(layout, dtype), free_bytes(device)
    if free is not None and needed > free:
        raise VllmcError(
            "not-enough-memory",
            f"the weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}",
            context={"needed_bytes": needed, "free_bytes": free},
            hint="vllmc warm needs no weights; --layers N builds fewer layers",
        )
