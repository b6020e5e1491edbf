"""Runs what Inductor generated without importing Inductor.

Imports no more than `torch`. Checked with torch 2.11 to 2.13: kernels are Python extension
modules named `kernel`, told the address of torch's data-pointer function by an environment
variable (`CppPythonBindingsCodeCache` in torch's codecache).
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from vllmc.core.torch_compat.binding import ENTRY, bound_wrapper

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


class Wrapper:
    """A reduced wrapper, with what it is `provided`, by name. Called, it empties its list.

    `name` is what a traceback calls it.
    """

    def __init__(self, source: str, provided: Mapping[str, object], *, name: str) -> None:
        self._source = source
        self._provided = provided
        self._name = name
        self._call: Callable[[list[Any]], tuple[Any, ...]] | None = None
        self._binders: dict[tuple[int, ...], Callable[..., Any] | None] = {}

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        """The results of the wrapper's `call`."""
        if self._call is None:
            self._call = self._run(self._source)[ENTRY]
        return self._call(args)

    def bind(self, held: Mapping[int, object]) -> Callable[..., tuple[Any, ...]] | None:
        """The function of the other arguments, given those of the places `held`, in any order.

        What the wrapper does with these alone it does now. None where it cannot be taken apart.
        """
        places = tuple(sorted(held))
        if places not in self._binders:
            module = bound_wrapper(self._source, places)
            self._binders[places] = None if module is None else self._run(module)["bind"]
        bind = self._binders[places]
        return None if bind is None else bind(*(held[place] for place in places))

    def _run(self, code: str | ast.Module) -> dict[str, Any]:
        namespace: dict[str, Any] = {"__name__": self._name, **self._provided}
        exec(compile(code, f"<vllmc {self._name}>", "exec"), namespace)
        return namespace
