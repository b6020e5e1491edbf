"""The Python values that a captured graph depends on, read again without capturing anything.

Dynamo guards on them: attributes of modules, globals, closures, default arguments. A stored program
has no guards, so a model that Python code makes is looked at before its program is used. Only
lookups are evaluated: a record is data, and no expression in it may do anything.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, Final

import torch

from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.cache.redaction import redact, scrub

# Covered by factors and by digests of the traced files, as for every model of Transformers.
_COVERED: Final = ("torch", "transformers", "vllmc")
_CALLS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "type": type,
    "vars": vars,
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "len": len,
}
_LONG: Final = 200
_DEEP: Final = 6


def read_guarded(expressions: Iterable[str], entry: torch.nn.Module) -> dict[str, JsonValue]:
    """What each expression over `L['self']`, which is `entry`, and `M[module]` stands for now.

    Plain values as they are, long ones as a digest, others by the name of their class. Of what
    holds a secret nothing is told, not even a digest, from which a short one could be guessed: it
    is `REDACTED`, and a program that depends on it is not found again. Imports the modules that are
    named. Expressions over the modules of torch, Transformers and vllmc are left out.
    """
    found: dict[str, JsonValue] = {}
    for expression in sorted(set(map(scrub, expressions))):
        if REDACTED in expression:
            found[expression] = REDACTED
            continue
        tree = ast.parse(expression, mode="eval").body
        if _root(tree).partition(".")[0] in _COVERED:
            continue
        try:
            found[expression] = _shown(_name_of(tree), _look_up(tree, entry))
        except (LookupError, AttributeError, TypeError, ValueError, ImportError):
            found[expression] = UNREADABLE
    return found


def _root(tree: ast.expr) -> str:
    """The module that an expression starts from; empty for the model's own."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id="M"), slice=ast.Constant(value=str(name))):
                return name
    return ""


def _look_up(node: ast.expr, entry: torch.nn.Module) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="self")):
            return entry
        case ast.Subscript(value=ast.Name(id="M"), slice=ast.Constant(value=str(name))):
            return importlib.import_module(name)
        case ast.Subscript(value=value, slice=key):
            return _look_up(value, entry)[_look_up(key, entry)]
        case ast.Attribute(value=value, attr=name):
            return getattr(_look_up(value, entry), name)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CALLS:
            return _CALLS[name](_look_up(argument, entry))
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="dict"), attr="__getitem__"), args=[value, key]
        ):
            return dict.__getitem__(_look_up(value, entry), _look_up(key, entry))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="dict"), attr="keys"), args=[value]):
            return dict.keys(_look_up(value, entry))
        case _:
            raise LookupError(ast.unparse(node))


def _shown(name: str, value: Any) -> JsonValue:
    described = _describe(value, _DEEP)
    if redact(name, described) != described:
        return REDACTED
    text = canonical_json(described)
    return f"sha256:{sha256_hex(text)}" if len(text) > _LONG else described


def _name_of(tree: ast.expr) -> str:
    """What the value that is read is called; empty where it is something about that value."""
    match tree:
        case ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return name
        case ast.Subscript(value=value):
            return _name_of(value)
        case ast.Call(func=ast.Name(id="type" | "len")):
            return ""
        case ast.Call(args=[*_, last]):
            return str(last.value) if isinstance(last, ast.Constant) else _name_of(last)
    return ""


def _describe(value: Any, depth: int) -> JsonValue:
    match value:
        case Enum():
            return f"{_qualified(type(value))}.{value.name}"
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case torch.Tensor():
            return f"{value.dtype} {list(value.shape)}"
        case torch.dtype() | torch.device() | torch.layout() | bytes() | complex() | range():
            return repr(value)
        case ModuleType():
            return f"module {value.__name__}"
        case type():
            return f"class {_qualified(value)}"
        case list() | tuple() | set() | frozenset() | dict() if depth == 0:
            return _qualified(type(value))
        case list() | tuple():
            return [_describe(item, depth - 1) for item in value]
        case set() | frozenset():
            return sorted((_describe(item, depth - 1) for item in value), key=json.dumps)
        case dict():
            return {str(k): _describe(item, depth - 1) for k, item in value.items()}
    return _qualified(value) if hasattr(value, "__qualname__") else _qualified(type(value))


def _qualified(named: Any) -> str:
    # A method that is built in belongs to no module.
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
