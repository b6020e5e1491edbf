"""What expressions over a module stand for, looked up over and over.

Only lookups are evaluated: expressions come from records, which are data, and none may do anything.
Each is parsed once, and what several have in common is looked up once at a time.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from operator import contains, getitem, is_
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from vllmc.core.torch_compat.ops import registrations

_Function: TypeAlias = Callable[..., Any]

_CALLS: Final[Mapping[str, _Function]] = {
    "type": type,
    "vars": vars,
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "len": len,
}
_FAILURES: Final = (LookupError, AttributeError, TypeError, ValueError, ImportError)


class Lookups:
    """Expressions over `L['self']`, which is `entry`, `M[module]` and `O[op]`.

    `O[op]` stands for the places where a custom op is implemented.
    """

    def __init__(self, entry: torch.nn.Module) -> None:
        self._entry = entry
        # A function, and the places of the values that it is called with. The entry has place 0.
        self._steps: list[tuple[_Function, tuple[int, ...]]] = []
        self._places: dict[object, int] = {"self": 0}

    def add(self, tree: ast.expr) -> int:
        """The place at which `read` gives the value of an expression."""
        return self._add(tree)

    def read(self, entry: torch.nn.Module | None = None) -> tuple[list[Any], set[int]]:
        """The values as they are now, by their places, and the places of those that have none.

        With `entry` they are those of another module. Imports the modules that are named.
        """
        values: list[Any] = [self._entry if entry is None else entry]
        failed: set[int] = set()
        for function, operands in self._steps:
            try:
                if failed and not failed.isdisjoint(operands):
                    raise LookupError
                values.append(function(*[values[place] for place in operands]))
            except _FAILURES:
                failed.add(len(values))
                values.append(None)
        return values, failed

    def _step(self, what: object, function: _Function, *trees: ast.expr) -> int:
        """The place of what `function` makes of the values of `trees`; `what` is its name."""
        operands = tuple(self._add(tree) for tree in trees)
        key = (what, operands)
        if key not in self._places:
            self._steps.append((function, operands))
            self._places[key] = len(self._steps)
        return self._places[key]

    def _constant(self, value: object) -> int:
        return self._step(("constant", type(value), repr(value)), lambda: value)

    def _add(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=value):
                return self._constant(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return self._constant(-value)
            case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="self")):
                return self._places["self"]
            case ast.Subscript(value=ast.Name(id="O"), slice=ast.Constant(value=str(name))):
                return self._step(("op", name), lambda: _implementations(name))
            case ast.Subscript(value=ast.Name(id="M"), slice=ast.Constant(value=str(name))):
                return self._step(("module", name), lambda: importlib.import_module(name))
            case ast.Subscript(value=value, slice=key):
                return self._step("item", getitem, value, key)
            case ast.Attribute(value=value, attr=name):
                return self._step(("attribute", name), lambda owner: getattr(owner, name), value)
            case ast.Call(func=ast.Name(id=name), args=[value], keywords=[]) if name in _CALLS:
                return self._step(("call", name), _CALLS[name], value)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="dict"), attr="__getitem__"), args=[value, key]
            ):
                return self._step("dict item", dict.__getitem__, value, key)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="dict"), attr="keys"), args=[value]):
                return self._step("keys", dict.keys, value)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="object"), attr="__getattribute__"),
                args=[value, ast.Constant(value=str()) as key],
            ):
                return self._step("own attribute", object.__getattribute__, value, key)
            case ast.Call(func=ast.Name(id="hasattr"), args=[value, ast.Constant() as key]):
                return self._step("hasattr", hasattr, value, key)
            case ast.Compare(left=ast.Constant() as key, ops=[ast.In()], comparators=[value]):
                return self._step("in", contains, value, key)
            case ast.Compare(left=value, ops=[ast.Is()], comparators=[other]):
                return self._step("is", is_, value, other)
        return self._step(("none", ast.unparse(node)), _fail)


def _implementations(name: str) -> list[str]:
    return [f"{Path(file).name}:{line}" for file, line in registrations(name)]


def _fail() -> None:
    raise LookupError
