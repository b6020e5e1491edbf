"""Compilers by name."""

from __future__ import annotations

from vllmc.core.compiler.eager import EagerCompiler
from vllmc.core.compiler.inductor import InductorCompiler
from vllmc.core.compiler.protocol import Compiler
from vllmc.core.errors import UsageError


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`. Raises `UsageError` (`unknown-backend`)."""
    compilers: dict[str, type[EagerCompiler] | type[InductorCompiler]] = {
        "inductor": InductorCompiler,
        "eager": EagerCompiler,
    }
    if name not in compilers:
        raise UsageError(
            "unknown-backend",
            f"there is no backend '{name}'",
            hint=f"--backend {' or '.join(compilers)}",
        )
    return compilers[name]()
