"""Conditions on the sizes of a call, as a record keeps them. Imports no torch.

A condition is a Python expression over `d0`, `d1`, ..., the varying sizes in the layout's order. A
record is data: only arithmetic and comparisons are evaluated.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from vllmc.core.errors import UnsafeCacheError
from vllmc.core.syntax import parse_expression

Condition: TypeAlias = Callable[..., bool]
"""Takes all varying sizes, in the layout's order."""

_SIZE = re.compile(r"\bd(\d+)\b")
_ALLOWED: Final = (
    *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Load),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod),
)
_FUNCTIONS: Final = {"min": min, "max": max}


def can_be_kept(text: str) -> bool:
    """Whether `text` is such a condition."""
    try:
        tree = parse_expression(text)
    except (SyntaxError, ValueError):
        return False
    return all(_allowed(node) for node in ast.walk(tree))


def read_condition(text: str, sizes: int) -> Condition:
    """The function that says whether the condition holds, of as many arguments as `sizes`.

    Raises `UnsafeCacheError` (`bad-record`) where it is no condition.
    """
    if not can_be_kept(text) or any(place >= sizes for place in read_by(text)):
        raise UnsafeCacheError(
            "bad-record",
            "a program record holds a condition that vllmc cannot evaluate",
            context={"condition": text},
            hint="compile it again: vllmc warm --force",
        )
    names = ", ".join(f"d{index}" for index in range(sizes))
    condition: Condition = eval(f"lambda {names}: {text}", {"__builtins__": _FUNCTIONS})
    return condition


def spoken(text: str, sizes: Sequence[str]) -> str:
    """The condition with the names of the `sizes`, for a person."""
    plain = ast.unparse(parse_expression(text))
    return _SIZE.sub(lambda found: sizes[int(found[1])], plain)


def read_by(text: str) -> tuple[int, ...]:
    """Which sizes the condition reads, by their places."""
    return tuple(sorted({int(found[1]) for found in _SIZE.finditer(text)}))


def _allowed(node: ast.AST) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _FUNCTIONS or _SIZE.fullmatch(name) is not None
        case ast.Constant(value=value):
            return type(value) in (int, bool)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            return name in _FUNCTIONS
    return isinstance(node, _ALLOWED)
