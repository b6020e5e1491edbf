"""Small copies to a GPU that nothing waits for."""

from __future__ import annotations

import torch


def sent(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`host`, a tensor on the CPU, on `device`; work that is launched there afterwards sees it.

    From pageable memory a copy to a GPU would wait until the GPU has done all before it.
    """
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def sent_numbers(numbers: list[int] | list[list[int]], device: torch.device | str) -> torch.Tensor:
    """The numbers as an int64 tensor on `device`: see `sent`."""
    return sent(torch.tensor(numbers, dtype=torch.int64), device)
