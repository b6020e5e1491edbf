"""Reduces a wrapper that Inductor generated to the part that runs, free of Inductor's imports.

A generated wrapper is a Python module whose `call(args)` does the work. Around it stand imports
of a good second, the sources of its kernels (compiled by the time it is read here) and a
benchmark of itself. What `call` does not reach is dropped; the kernels and matrix products are
provided by whoever runs the result.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from torch._inductor.select_algorithm import extern_kernels
from vllmc.core.torch_compat.native import LIGHT_EXTERN_KERNELS

ENTRY = "call"
KERNEL_FACTORY = "async_compile"


class NotPortable(Exception):
    """The wrapper calls something that only Inductor can provide. `construct` names it."""

    def __init__(self, construct: str) -> None:
        super().__init__(construct)
        self.construct = construct


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """`source` defines `call(args: list) -> tuple`, given `provided` names in its namespace."""

    source: str
    provided: tuple[str, ...]


def reduce_wrapper(source: str, *, provided: frozenset[str]) -> Reduced:
    """Reduces `source`; `provided` are the names of its kernels and constants.

    Raises `NotPortable` where a statement that `call` reaches compiles something at load time.
    """
    module = ast.parse(source)
    statements = _reached(module.body)
    if _uses_light_kernels_alone(statements):
        provided |= {"extern_kernels"}
    kept = [s for s in (_without(s, provided) for s in statements) if s is not None]
    for statement in kept:
        if KERNEL_FACTORY in _names_read(statement):
            raise NotPortable(ast.unparse(statement).splitlines()[0][:120])
    text = "\n\n".join(ast.unparse(statement) for statement in kept)
    used = {name for statement in statements for name in _names_read(statement)}
    return Reduced(source=text + "\n", provided=tuple(sorted(provided & used)))


def _reached(body: list[ast.stmt]) -> list[ast.stmt]:
    """The top-level statements that `call` needs, in their order."""
    wanted, chosen = {ENTRY}, set[int]()
    while True:
        more = [
            index
            for index, statement in enumerate(body)
            if index not in chosen and not wanted.isdisjoint(_names_bound(statement))
        ]
        if not more:
            return [body[index] for index in sorted(chosen)]
        for index in more:
            chosen.add(index)
            wanted |= _names_read(body[index])


def _names_bound(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return {(alias.asname or alias.name).split(".")[0] for alias in names}
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


def _without(statement: ast.stmt, provided: frozenset[str]) -> ast.stmt | None:
    """`statement` less the bindings of names that are provided; None where nothing is left."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        aliases = [a for a in statement.names if (a.asname or a.name) not in provided]
        if not aliases:
            return None
        statement.names = aliases
        return statement
    return None if _names_bound(statement) & provided else statement


def _uses_light_kernels_alone(statements: list[ast.stmt]) -> bool:
    used = {
        node.attr
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "extern_kernels"
    }
    light = vars(LIGHT_EXTERN_KERNELS)
    return all(name in light and getattr(extern_kernels, name) is light[name] for name in used)
