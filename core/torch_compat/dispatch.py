"""Whether a call may go past torch's dispatcher, straight to an op's implementation."""

from __future__ import annotations

import torch
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled

_BACKENDS = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA")


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether something would see, now, a call with `tensor` that the dispatcher makes.

    That is a mode, a profiler, autograd, or the tensor itself, of a class of its own.
    """
    return (
        type(tensor) is not torch.Tensor
        or torch.is_grad_enabled()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _profiler_enabled()
    )


def has_backend_kernel(op: torch._ops.OpOverload) -> bool:
    """Whether somebody registered a kernel of the op for one backend, besides that for all."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(op.name(), backend) for backend in _BACKENDS)
