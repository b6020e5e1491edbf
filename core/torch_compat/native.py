"""Runs what Inductor generated without importing Inductor.

Imports no more than `torch`. Checked with torch 2.11 to 2.13: kernels are Python extension
modules named `kernel`, told the address of torch's data-pointer function by an environment
variable (`CppPythonBindingsCodeCache` in torch's codecache).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

EXTERN_KERNELS = "extern_kernels"
"""The name by which wrappers call the matrix products and other library calls of Inductor."""

_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"


def extern_kernels(functions: Mapping[str, object]) -> SimpleNamespace:
    """The library calls of a wrapper: torch's own functions, by the names that it calls them.

    `functions` maps such a name to the function's name in `torch`. Raises `AttributeError`.
    """
    return SimpleNamespace(
        **{name: getattr(torch, str(function)) for name, function in functions.items()}
    )


def load_kernel(name: str, library: bytes) -> Callable[..., None]:
    """Loads the kernel in `library`, an ELF shared object, from memory (Linux: `memfd_create`).

    Raises `ImportError` or `OSError` where the library cannot be loaded on this machine.
    """
    os.environ[_ADDRESS] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)
    # From memory, so that what runs is the bytes that were verified, wherever the cache lies.
    descriptor = os.memfd_create(name)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(library)
        path = _spelled_as_never_before(descriptor)
        loader = importlib.machinery.ExtensionFileLoader("vllmc.kernel", path)
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.close(descriptor)
    kernel: Callable[..., None] = module.kernel
    return kernel


def _spelled_as_never_before(descriptor: int) -> str:
    """A path of the open file, in one of 2**64 ways.

    The dynamic loader takes a path that it has seen for the library that it had then, and the
    numbers of descriptors are used again. To leave them all open would spend a process's limit.
    """
    bits = secrets.randbits(64)
    noise = "".join("/" if bits >> place & 1 else "/./" for place in range(64))
    return f"/proc/self/fd{noise}{descriptor}"


def run_wrapper(
    source: str, provided: Mapping[str, object], *, name: str
) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Executes a reduced wrapper and returns its `call`, which empties the list it is given."""
    namespace: dict[str, Any] = {"__name__": name, **provided}
    exec(compile(source, f"<vllmc {name}>", "exec"), namespace)
    call: Callable[[list[Any]], tuple[Any, ...]] = namespace["call"]
    return call
