"""Gives a wrapper that Inductor generated its parameters once, instead of in each call.

A wrapper's `call` takes all arguments in one list. Each time it checks the sizes and strides of
parameters, and makes views of them (a transposed weight for each matrix product), which are the
same in every call. Here `call` is taken apart into `bind`, which does this once, and the function
of the other arguments that it returns. Imports no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Final

from vllmc.core.syntax import parse_module

ENTRY: Final = "call"

# What may be done once and for all: it reads no memory, and returns nothing or a view.
_CHECK: Final = "assert_size_stride"
_VIEW: Final = "reinterpret_tensor"


def bound_wrapper(source: str, held: Sequence[int]) -> ast.Module | None:
    """A module that defines `bind`, which takes the arguments at the places `held`, in that order.

    `bind` returns the function of the other arguments, in theirs. None where the wrapper is not of
    the form that Inductor gives it: then it has to be called as it is.
    """
    body = parse_module(source).body
    entry = next((s for s in body if _entry_in(s) is not None), None)
    if entry is None or (function := _entry_in(entry)) is None:
        return None
    names = _unpacked(function)
    if names is None or any(place >= len(names) for place in held):
        return None
    bound = [names[place] for place in held]
    kept = [(statement, _names(statement)) for statement in function.body[2:]]
    own = {name for _, found in kept for name, stored in found.items() if stored}
    taken = {argument.arg for argument in function.args.args}
    if not own.isdisjoint(bound) or any(not taken.isdisjoint(found) for _, found in kept):
        return None
    varying = own | (set(names) - set(bound))
    once, each = _divide(kept, frozenset(bound), frozenset(varying))
    inner = _function("step", [n for n in names if n not in bound], each)
    outer = _function("bind", bound, [*once, inner, ast.Return(_name("step"))])
    around = [s for s in body if s is not entry and not _reads_entry(s, entry)]
    module = ast.Module(body=[*around, outer], type_ignores=[])
    return ast.fix_missing_locations(module)


def _entry_in(statement: ast.stmt) -> ast.FunctionDef | None:
    """The wrapper's `call`: a function of the module, or a method of the class `Runner`."""
    inside = statement.body if isinstance(statement, ast.ClassDef) else [statement]
    found = (s for s in inside if isinstance(s, ast.FunctionDef) and s.name == ENTRY)
    return next(found, None)


def _unpacked(function: ast.FunctionDef) -> list[str] | None:
    """The names that `call` unpacks its list into, where it begins with that and empties it."""
    match function.body:
        case [
            ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Name(id=given)),
            ast.Expr(ast.Call(func=ast.Attribute(value=ast.Name(id=emptied), attr="clear"))),
            *_,
        ] if given == emptied == function.args.args[-1].arg:
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            return names if len(names) == len(targets) else None
    return None


def _reads_entry(statement: ast.stmt, entry: ast.stmt) -> bool:
    """Whether it is what makes `call` of the class around it: `runner`, and `runner.call`."""
    if not isinstance(entry, ast.ClassDef) or not isinstance(statement, ast.Assign):
        return False
    return not {entry.name, "runner"}.isdisjoint(_names(statement))


def _divide(
    statements: Sequence[tuple[ast.stmt, Mapping[str, bool]]],
    bound: frozenset[str],
    varying: frozenset[str],
) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """What to do once, and in each call."""
    once: list[ast.stmt] = []
    each: list[ast.stmt] = []
    views = _Views(varying)
    for statement, names in statements:
        match statement:
            case _ if bound.isdisjoint(names):
                each.append(statement)
            case ast.Expr(ast.Call(func=ast.Name(id=name))) if (
                name == _CHECK and varying.isdisjoint(names)
            ):
                once.append(statement)
            case ast.Delete(targets=targets):
                # What is bound lives as long as the program.
                left = [t for t in targets if bound.isdisjoint(_names(t))]
                if left:
                    each.append(ast.Delete(targets=left))
            case ast.Assign() | ast.Expr() | ast.Return():
                each.append(views.visit(statement))
            case _:
                each.append(statement)
    return [*once, *views.made], each


class _Views(ast.NodeTransformer):
    """Replaces views that say the same in every call by names, which `made` assigns."""

    def __init__(self, varying: frozenset[str]) -> None:
        self._varying = varying
        self._known: dict[str, str] = {}
        self.made: list[ast.stmt] = []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """A call of `reinterpret_tensor` becomes a name where it can; others stay."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id=name)) if name == _VIEW and self._varying.isdisjoint(
                _names(node)
            ):
                text = ast.dump(node)
                if text not in self._known:
                    self._known[text] = f"bound_{len(self._known)}"
                    target = ast.Name(id=self._known[text], ctx=ast.Store())
                    self.made.append(ast.Assign(targets=[target], value=node))
                return _name(self._known[text])
        return node


def _function(name: str, arguments: Sequence[str], body: list[ast.stmt]) -> ast.FunctionDef:
    made = parse_module(f"def {name}({', '.join(arguments)}): pass").body[0]
    assert isinstance(made, ast.FunctionDef)
    made.body = body
    return made


def _name(name: str) -> ast.Name:
    return ast.Name(id=name, ctx=ast.Load())


def _names(node: ast.AST) -> dict[str, bool]:
    """The names in `node`, and whether they are bound there."""
    found: dict[str, bool] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            stored = isinstance(inner.ctx, ast.Store)
            found[inner.id] = found.get(inner.id, False) or stored
    return found
