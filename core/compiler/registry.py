"""Compilers by name."""

from __future__ import annotations

from collections.abc import Callable

from vllmc.core.compiler.protocol import Compiler
from vllmc.core.errors import UsageError


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`. Raises `UsageError` (`unknown-backend`)."""
    compilers: dict[str, Callable[[], Compiler]] = {"inductor": _inductor, "eager": _eager}
    if name not in compilers:
        raise UsageError(
            "unknown-backend",
            f"there is no backend '{name}'",
            hint=f"--backend {' or '.join(compilers)}",
        )
    return compilers[name]()


# Importing Inductor takes more than a second, and only compiling with it needs it.
def _inductor() -> Compiler:
    from vllmc.core.compiler.inductor import InductorCompiler

    return InductorCompiler()


def _eager() -> Compiler:
    from vllmc.core.compiler.eager import EagerCompiler

    return EagerCompiler()
