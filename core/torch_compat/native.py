"""Runs what Inductor generated without importing Inductor.

Imports no more than `torch`. Checked with torch 2.11 to 2.13: kernels are Python extension
modules named `kernel`, told the address of torch's data-pointer function by an environment
variable (`CppPythonBindingsCodeCache` in torch's codecache).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

LIGHT_EXTERN_KERNELS = SimpleNamespace(
    mm=torch.mm, bmm=torch.bmm, addmm=torch.addmm, baddbmm=torch.baddbmm
)
"""The library calls of wrappers that need no Inductor: torch's own, under the same names."""

_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"


def load_kernel(name: str, library: bytes) -> Callable[..., None]:
    """Loads the kernel in `library`, an ELF shared object, from memory (Linux: `memfd_create`).

    Raises `ImportError` or `OSError` where the library cannot be loaded on this machine.
    """
    os.environ[_ADDRESS] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)
    # From memory, so that what runs is the bytes that were verified, wherever the cache lies. The
    # descriptor stays open: the loader takes a path that it has seen for the library it had then.
    descriptor = os.memfd_create(name)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(library)
    path = f"/proc/self/fd/{descriptor}"
    loader = importlib.machinery.ExtensionFileLoader(f"vllmc_{descriptor}.kernel", path)
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    kernel: Callable[..., None] = module.kernel
    return kernel


def run_wrapper(
    source: str, provided: Mapping[str, object], *, name: str
) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Executes a reduced wrapper and returns its `call`, which empties the list it is given."""
    namespace: dict[str, Any] = {"__name__": name, **provided}
    exec(compile(source, f"<vllmc {name}>", "exec"), namespace)
    call: Callable[[list[Any]], tuple[Any, ...]] = namespace["call"]
    return call
