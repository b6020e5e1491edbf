"""The Python values that a captured graph depends on, read again without capturing anything.

Dynamo guards on them: attributes of modules, globals, closures, default arguments. A stored program
has no guards, so a model that Python code makes is looked at before its program is used. Only
lookups are evaluated: a record is data, and no expression in it may do anything.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, Final

import torch

from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.cache.redaction import redact, scrub
from vllmc.core.models.described import describe
from vllmc.core.syntax import parse_expression
from vllmc.core.torch_compat.ops import registrations

_CALLS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "type": type,
    "vars": vars,
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "len": len,
}
HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""The attributes of a module that hold functions to be called with it."""

_TABLES: Final = ("_modules", "_parameters", "_buffers")
# Whether two of these are one object plays no part.
_BY_VALUE: Final = (
    *(NoneType, bool, int, float, complex, str, bytes, tuple, frozenset, range, type, Enum),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType),
    *(torch.dtype, torch.device, torch.layout),
)
_LONG: Final = 200


def read_guarded(expressions: Iterable[str], entry: torch.nn.Module) -> dict[str, JsonValue]:
    """What each expression over `L['self']`, which is `entry`, and `M[module]` stands for now.

    `O[op]` stands for the places where a custom op is implemented.

    Each as `describe` tells it, a long one as a digest. Of what holds a secret nothing is told, not
    even a digest, from which a short one could be guessed: it is `REDACTED`, and a program that
    depends on it is not found again. Imports the modules that are named. Left out is what factors
    cover: of the model the tree of modules with its tensors and hooks (see `ModuleModel.factors`).
    Torch's own modules are not: others replace functions in them. What was told already is told
    by where: code may ask whether two are one.
    """
    found: dict[str, JsonValue] = {}
    known: dict[int, tuple[str, Any]] = {
        id(tensor): (f"self.{name}", tensor) for name, tensor in _tensors(entry)
    }
    for expression in sorted(set(map(scrub, expressions))):
        if REDACTED in expression:
            found[expression] = REDACTED
            continue
        tree = parse_expression(expression)
        root = _root(tree)
        if _of_the_tree(tree):
            continue
        try:
            value = _look_up(tree, entry)
        except (LookupError, AttributeError, TypeError, ValueError, ImportError):
            found[expression] = UNREADABLE
            continue
        if not root and isinstance(value, torch.nn.Module):
            continue
        shown = _shown(_name_of(tree), value)
        if shown != REDACTED and not isinstance(value, _BY_VALUE):
            # Kept with its name, so that no other takes its address.
            same, _ = known.setdefault(id(value), (expression, value))
            shown = shown if same == expression else f"<{same}>"
        found[expression] = shown
    return found


def _tensors(entry: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from entry.named_parameters()
    yield from entry.named_buffers()


def _root(tree: ast.expr) -> str:
    """The module that an expression starts from; empty for the model's own."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id="M"), slice=ast.Constant(value=str(name))):
                return name
    return ""


def _of_the_tree(tree: ast.expr) -> bool:
    """Whether an expression reads the tables, tensors or hooks of a module of the model's tree.

    Also whether such a module has a forward of its own, which is one of its attributes.
    """
    match tree:
        case (
            ast.Attribute(value=owner, attr=name)
            | ast.Subscript(value=ast.Attribute(value=owner, attr=name))
        ) if name in (*_TABLES, *HOOKS):
            return _is_module(owner)
        case ast.Compare(left=ast.Constant(value="forward"), comparators=[ast.Call(args=[owner])]):
            return _is_module(owner)
    return False


def _is_module(node: ast.expr) -> bool:
    """Whether an expression goes from the model down its tree of modules."""
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="self")):
            return True
        case ast.Subscript(value=ast.Attribute(value=owner, attr="_modules"), slice=ast.Constant()):
            return _is_module(owner)
    return False


def _look_up(node: ast.expr, entry: torch.nn.Module) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return -value
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="self")):
            return entry
        case ast.Subscript(value=ast.Name(id="O"), slice=ast.Constant(value=str(name))):
            return [f"{Path(file).name}:{line}" for file, line in registrations(name)]
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
        case ast.Call(func=ast.Name(id="hasattr"), args=[value, ast.Constant(value=str(name))]):
            return hasattr(_look_up(value, entry), name)
        case ast.Compare(left=ast.Constant(value=name), ops=[ast.In()], comparators=[value]):
            return name in _look_up(value, entry)
        case ast.Compare(left=value, ops=[ast.Is()], comparators=[other]):
            return _look_up(value, entry) is _look_up(other, entry)
        case _:
            raise LookupError(ast.unparse(node))


def _shown(name: str, value: Any) -> JsonValue:
    described = describe(value)
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
