"""Python source to syntax trees, one thread at a time. Imports no torch."""

from __future__ import annotations

import ast
import threading

# CPython 3.11 counts the depth of the trees that it builds for all threads together: of two at once
# one may end in SystemError, "AST constructor recursion depth mismatch" (python/cpython#106905).
_PARSING = threading.Lock()


def parse_module(source: str | bytes) -> ast.Module:
    """The tree of a module's source. Raises `SyntaxError`, and `ValueError` for null bytes."""
    with _PARSING:
        return ast.parse(source)


def parse_expression(source: str) -> ast.expr:
    """The tree of an expression. Raises `SyntaxError`, and `ValueError` for null bytes."""
    with _PARSING:
        return ast.parse(source, mode="eval").body
