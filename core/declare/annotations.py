"""Which annotations stand for tensors or for containers of tensors, and where those keep them."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vllmc.core.syntax import parse_expression

_EITHER = (typing.Union, typing.Optional, types.UnionType)
_QUALIFIED = (typing.Annotated, typing.Required, typing.NotRequired)
# `torch.FloatTensor` and the like are no subclasses of `torch.Tensor`.
_LEGACY_TENSOR = type(torch.FloatTensor)


def holds_tensors(annotation: object, namespace: Mapping[str, object]) -> bool:
    """Whether `annotation` describes a tensor, or something that holds tensors.

    That is a tensor's class, a mapping to or a sequence of such, a dataclass, `NamedTuple` or
    `TypedDict` with such a field, and a class with such an attribute `tensors`; or a union of which
    one member is. Text is looked up in `namespace`. A name that is not there, because it is
    imported for type checkers alone, is taken for a container of `typing` by its name, or for a
    tensor where it ends in `Tensor` or `Tensors`.
    """
    return _holds(annotation, namespace, frozenset())


def field_names(kind: type) -> tuple[str, ...]:
    """The attributes in which instances of `kind` may keep tensors."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if issubclass(kind, tuple):
        return tuple(getattr(kind, "_fields", ()))
    return ("tensors",)


def _holds(annotation: object, namespace: Mapping[str, object], seen: frozenset[type]) -> bool:
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        try:
            return _text_holds(parse_expression(annotation), namespace, seen)
        except (SyntaxError, ValueError):
            return False
    if isinstance(annotation, type):
        return _class_holds(annotation, seen)
    origin = typing.get_origin(annotation)
    parts = (origin, *_parts(origin, typing.get_args(annotation))) if origin else ()
    return any(_holds(part, namespace, seen) for part in parts)


def _parts(origin: object, args: Sequence[Any]) -> Sequence[Any]:
    """Those of the arguments of a generic that say what its instances hold."""
    if origin in _EITHER:
        return args
    if origin in _QUALIFIED:
        return args[:1]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return args[-1:]
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return args
    return ()


def _class_holds(kind: type, seen: frozenset[type]) -> bool:
    if issubclass(kind, torch.Tensor) or isinstance(kind, _LEGACY_TENSOR):
        return True
    if kind in seen:
        return False
    return any(
        _holds(annotation, _globals(owner), seen | {kind}) for owner, annotation in _described(kind)
    )


def _globals(kind: type) -> Mapping[str, object]:
    module = sys.modules.get(kind.__module__)
    return vars(module) if module else {}


def _described(kind: type) -> Iterator[tuple[type, object]]:
    """What classes say of the values in instances of `kind`, each with the class that says it."""
    names = field_names(kind)
    for owner in kind.__mro__:
        # class Hidden(dict[str, Tensor])
        yield from ((owner, base) for base in vars(owner).get("__orig_bases__", ()))
        for name, annotation in inspect.get_annotations(owner).items():
            if name in names or typing.is_typeddict(owner):
                yield owner, annotation


def _text_holds(node: ast.expr, namespace: Mapping[str, object], seen: frozenset[type]) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return _holds(text, namespace, seen)
        case ast.BinOp(op=ast.BitOr()):
            parts: Sequence[ast.expr] = (node.left, node.right)
        case ast.Subscript():
            generic = _named(node.value, namespace)
            args = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            parts = (node.value, *_parts(typing.get_origin(generic) or generic, args))
        case _:
            return _holds(_named(node, namespace), namespace, seen)
    return any(_text_holds(part, namespace, seen) for part in parts)


def _named(node: ast.expr, namespace: Mapping[str, object]) -> object:
    try:
        return _looked_up(node, namespace)
    except (KeyError, AttributeError):
        name = ast.unparse(node).rpartition(".")[2]
        if name.endswith(("Tensor", "Tensors")):
            return torch.Tensor
        return getattr(typing, name, None)


def _looked_up(node: ast.expr, namespace: Mapping[str, object]) -> object:
    match node:
        case ast.Name(id=name):
            return namespace[name] if name in namespace else vars(builtins)[name]
        case ast.Attribute(value=owner, attr=name):
            return getattr(_looked_up(owner, namespace), name)
    return None
