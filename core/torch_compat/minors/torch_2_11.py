"""torch 2.11."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllmc.core.torch_compat.minors.torch_2_12 import Torch212

if TYPE_CHECKING:
    from torch._guards import Guard


class Torch211(Torch212):
    """Overrides are the process's, sizes have no least one, and more options are not there yet."""

    local_overrides = False
    takes_least_size = False
    absent = Torch212.absent | {
        ("inductor", "_cache_config_factory_keys"),
        ("dynamo", "debug_dynamo_config_override"),
        ("dynamo", "inline_invoke_subgraph"),
        ("dynamo", "symbolic_shapes.aggressive_guard_free_semantics"),
    }

    def before_fake_modes(self) -> None:
        """See `Newest`. Mended in 2.12: https://github.com/pytorch/pytorch/pull/178950."""
        _keep_device_guard()

    def mark_unbacked_size(
        self,
        tensor: torch.Tensor,
        dim: int,
        *,
        low: int,  # noqa: ARG002 - compiled code states it, with `torch._check`
    ) -> None:
        """See `Newest`."""
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, dim)

    @contextmanager
    def unguarded_reads(self) -> Iterator[list[str]]:
        """See `Newest`. Constants that are read from a class have no guard; one thread at a time.

        The method of Dynamo's that reads them is exchanged within the block.
        """
        from torch._dynamo.exc import ObservedAttributeError
        from torch._dynamo.variables import ConstantVariable, EnumVariable, UserDefinedClassVariable

        found: list[str] = []
        original = UserDefinedClassVariable.var_getattr

        def var_getattr(self: Any, tx: Any, name: str) -> Any:
            try:
                value = original(self, tx, name)
            except ObservedAttributeError:
                if self.source is not None:
                    found.append(f"hasattr({self.source.name}, {name!r})")
                raise
            if self.source is not None and isinstance(value, (ConstantVariable, EnumVariable)):
                found.append(f"{self.source.name}.{name}")
            return value

        UserDefinedClassVariable.var_getattr = var_getattr
        try:
            yield found
        finally:
            UserDefinedClassVariable.var_getattr = original

    def guarded_attribute(self, guard: Guard) -> tuple[str, str]:
        """See `Newest`. Here the guard is one on the attribute."""
        source = guard.originating_source
        return source.base.name, source.member


@functools.cache
def _keep_device_guard() -> None:
    """Has a thread that does not end enter the first fake mode of a process that sees no GPU.

    That thread's stand-in for the GPU serves the whole process, a build for CUDA that is: with the
    thread it is freed, and the next fake mode would read what is no longer there.
    """
    if torch.version.cuda is None or torch.cuda.is_available():
        return
    if threading.current_thread() is threading.main_thread():
        torch._C._ensureCUDADeviceGuardSet()
        return
    kept = threading.Event()

    def keep() -> None:
        torch._C._ensureCUDADeviceGuardSet()
        kept.set()
        threading.Event().wait()

    threading.Thread(target=keep, name="vllmc-device-guard", daemon=True).start()
    kept.wait()
