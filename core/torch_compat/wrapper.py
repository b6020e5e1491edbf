"""Reduces a wrapper that Inductor generated to the part that runs, free of Inductor's imports.

A generated wrapper is a Python module whose `call(args)` does the work. Around it stand imports
of a good second, the sources of its kernels (compiled by the time it is read here) and a
benchmark of itself. What `call` does not reach is dropped; the kernels and matrix products are
provided by whoever runs the result.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch._inductor.select_algorithm import extern_kernels

from vllmc.core.syntax import parse_module
from vllmc.core.torch_compat.binding import ENTRY
from vllmc.core.torch_compat.native import EXTERN_KERNELS

# What these modules give a wrapper compiles its code when the wrapper is loaded.
_COMPILING_MODULES = ("torch._inductor.async_compile", "torch._inductor.codecache")


WRITTEN_OUT: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        (
            "torch._inductor.runtime.runtime_utils",
            "assert_tensor_metadata",
        ): """
def assert_tensor_metadata(tensor, size, stride, dtype, op=None):
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise RuntimeError(f"expected dtype {dtype} but got {tensor.dtype} from {op}")
    torch._C._dynamo.guards.assert_size_stride(tensor, size, stride, op)
""",
    }
)
"""What a wrapper imports from Inductor to run, and the same in terms of `torch`: from 2.14."""


class NotPortable(Exception):
    """The wrapper calls something that only Inductor can provide. `construct` names it."""

    def __init__(self, construct: str) -> None:
        super().__init__(construct)
        self.construct = construct


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """`source` defines `call(args: list) -> tuple`, given `provided` names in its namespace.

    Where `extern_kernels` is one of them, `products` says which functions of `torch` it holds:
    (name in the wrapper, name in `torch`).
    """

    source: str
    provided: tuple[str, ...]
    products: tuple[tuple[str, str], ...]


def reduce_wrapper(source: str, *, provided: frozenset[str]) -> Reduced:
    """Reduces `source`; `provided` are the names of its kernels and constants.

    Raises `NotPortable` where something that `call` reaches compiles code at load time, or is
    bound in a way that this reading of the module does not see.
    """
    body = [_without_inductor(statement) for statement in parse_module(source).body]
    products = _products(_reached(body, provided))
    if products is not None:
        provided |= {EXTERN_KERNELS}
    statements = _reached(body, provided)
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.module in _COMPILING_MODULES:
            raise NotPortable(ast.unparse(statement))
    text = "\n\n".join(ast.unparse(statement) for statement in statements) + "\n"
    used = {name for statement in statements for name in _names_read(statement)}
    bound = {name for statement in statements for name in _names_bound(statement)}
    if unbound := set(_globals_read(text)) - bound - provided - set(dir(builtins)):
        raise NotPortable(", ".join(sorted(unbound)))
    return Reduced(
        source=text,
        provided=tuple(sorted(provided & used)),
        products=tuple(sorted((products or {}).items())) if EXTERN_KERNELS in used else (),
    )


def _without_inductor(statement: ast.stmt) -> ast.stmt:
    """`statement`, or the definition of what it imports from Inductor, which takes a second."""
    match statement:
        case ast.ImportFrom(module=str(module), names=[ast.alias(name=name, asname=None)]):
            written = WRITTEN_OUT.get((module, name))
            return statement if written is None else parse_module(written).body[0]
    return statement


def _reached(body: list[ast.stmt], provided: frozenset[str]) -> list[ast.stmt]:
    """The top-level statements that `call` needs, in their order, less bindings of `provided`."""
    wanted, chosen = {ENTRY}, dict[int, ast.stmt]()
    while True:
        more = [
            (index, needed)
            for index, statement in enumerate(body)
            if index not in chosen and (needed := _binding(statement, wanted - provided))
        ]
        if not more:
            return [chosen[index] for index in sorted(chosen)]
        for index, statement in more:
            chosen[index] = statement
            wanted |= _names_read(statement)


def _binding(statement: ast.stmt, wanted: set[str]) -> ast.stmt | None:
    """`statement` if it binds one of the names; of an import only those that are wanted."""
    if isinstance(statement, ast.Import):
        names = [a for a in statement.names if _alias(a) in wanted]
        return ast.Import(names=names) if names else None
    if isinstance(statement, ast.ImportFrom):
        names = [a for a in statement.names if _alias(a) in wanted]
        return (
            ast.ImportFrom(module=statement.module, names=names, level=statement.level)
            if names
            else None
        )
    return None if wanted.isdisjoint(_names_bound(statement)) else statement


def _alias(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def _names_bound(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {_alias(alias) for alias in names}
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {t.id for t in targets if isinstance(t, ast.Name)}
        case _:
            return set()


def _names_read(statement: ast.stmt) -> set[str]:
    return {
        node.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _globals_read(source: str) -> Iterator[str]:
    """Every name that some scope of `source` takes from the module or the builtins."""
    tables = [symtable.symtable(source, "<wrapper>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        module = table.get_type() == "module"
        for found in table.get_symbols():
            if found.is_referenced() and (module or found.is_global()):
                yield found.get_name()


def _products(statements: list[ast.stmt]) -> dict[str, str] | None:
    """The library calls of `statements` by their names in `torch`; None where one has none."""
    products = {}
    for statement in statements:
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == EXTERN_KERNELS
            ):
                function = getattr(extern_kernels, node.attr)
                name = getattr(function, "__name__", "")
                if getattr(torch, name, None) is not function:
                    return None
                products[node.attr] = name
    return products
