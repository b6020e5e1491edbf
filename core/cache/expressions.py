"""Expressions of guards, as a person would write what they read. Imports no torch."""

from __future__ import annotations

import ast

from vllmc.core.syntax import parse_expression

_OF_MODULES = ("_modules", "_parameters", "_buffers")


def spoken(expression: str) -> str:
    """`M['pkg.mod'].SIZE` as `pkg.mod.SIZE`, `L['self']._modules['mlp'].act` as `self.mlp.act`."""
    try:
        return ast.unparse(_Spoken().visit(parse_expression(expression)))
    except (SyntaxError, ValueError):
        return expression


def most_telling(expressions: list[str]) -> list[str]:
    """Those of which no other reads a part: what changed in a table changes the table."""
    return [e for e in expressions if not any(o != e and e in o for o in expressions)]


class _Spoken(ast.NodeTransformer):
    """Leaves out where values are kept: tables of modules, attributes and variables."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.Subscript(value=ast.Name(id="M" | "L"), slice=ast.Constant(value=str(name))):
                return ast.Name(id=name)
            case ast.Subscript(value=ast.Name(id="O"), slice=ast.Constant(value=str(name))):
                return ast.Name(id=f"torch.ops.{name.replace('::', '.')}")
            case ast.Subscript(
                value=ast.Attribute(value=owner, attr=table), slice=ast.Constant(value=str(name))
            ) if table in _OF_MODULES:
                return _member(owner, name)
            case ast.Subscript(
                value=ast.Call(
                    func=ast.Name(id="dict"), args=[ast.Attribute(value=owner, attr="__dict__")]
                )
                | ast.Call(func=ast.Name(id="vars"), args=[owner]),
                slice=ast.Constant(value=str(name)),
            ):
                return _member(owner, name)
            case ast.Subscript(
                value=ast.Attribute(value=ast.Attribute(attr="environ") as owner, attr="_data"),
                slice=ast.Constant(value=bytes(name)),
            ):
                key = ast.Constant(value=name.decode(errors="replace"))
                return ast.Subscript(value=owner, slice=key, ctx=ast.Load())
        return node


def _member(owner: ast.expr, name: str) -> ast.expr:
    if name.isidentifier():
        return ast.Attribute(value=owner, attr=name, ctx=ast.Load())
    index = ast.Constant(value=int(name) if name.isdecimal() else name)
    return ast.Subscript(value=owner, slice=index, ctx=ast.Load())
