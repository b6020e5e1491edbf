"""The Python values that a captured graph depends on, read again without capturing anything.

Dynamo guards on them: attributes of modules, globals, closures, default arguments. A stored program
has no guards, so a model that Python code makes is looked at before its program is used, and while
it runs if one asks for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, Final

import torch

from vllmc.core.cache.explain import alike
from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json, sha256_hex
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.cache.redaction import redact, scrub
from vllmc.core.models.described import describe
from vllmc.core.models.lookups import Lookups
from vllmc.core.syntax import parse_expression
from vllmc.core.torch_compat.forward import EXCHANGED

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
_CONTAINERS: Final = (list, tuple, dict, set)
# Containers deeper than this are not looked into: `describe` does not tell what they hold.
_DEEP: Final = 6
_END: Final = object()
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
    with EXCHANGED:
        return _read_guarded(sorted(set(map(scrub, expressions))), entry)


def _read_guarded(expressions: Iterable[str], entry: torch.nn.Module) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    known: dict[int, tuple[str, Any]] = {
        id(tensor): (f"self.{name}", tensor) for name, tensor in _tensors(entry)
    }
    lookups = Lookups(entry)
    places: dict[str, tuple[ast.expr, int]] = {}
    for expression in expressions:
        if REDACTED in expression:
            found[expression] = REDACTED
        elif not is_of_the_tree(tree := parse_expression(expression)):
            places[expression] = (tree, lookups.add(tree))
    values, failed = lookups.read()
    for expression, (tree, place) in places.items():
        value = values[place]
        if place in failed:
            found[expression] = UNREADABLE
            continue
        if not _root(tree) and isinstance(value, torch.nn.Module):
            continue
        shown = _shown(_name_of(tree), value)
        if shown != REDACTED and not isinstance(value, _BY_VALUE):
            # Kept with its name, so that no other takes its address.
            same, _ = known.setdefault(id(value), (expression, value))
            shown = shown if same == expression else f"<{same}>"
        found[expression] = shown
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """A value that should be as `told`, and is while it consists of `objects` (empty: never)."""

    expression: str
    place: int
    name: str
    objects: list[object]
    told: JsonValue


class GuardedValues:
    """The values of a record's expressions in `entry`, to be read again while a program runs.

    `recorded` is what `read_guarded` told when the program was captured. A reading takes a fraction
    of the time that `read_guarded` takes: nothing is told again of what is the same object, or a
    container of the same objects. Attributes of objects have expressions of their own.
    """

    def __init__(self, recorded: Mapping[str, JsonValue], entry: torch.nn.Module) -> None:
        self._lookups = Lookups(entry)
        known = {e: parse_expression(e) for e in recorded if REDACTED not in e}
        places = {e: self._lookups.add(tree) for e, tree in known.items()}
        now = read_guarded(known, entry)
        values, failed = self._lookups.read()
        self._watched = []
        for expression, place in places.items():
            name, value, told = _name_of(known[expression]), values[place], recorded[expression]
            objects = []
            if place not in failed and alike(now.get(expression), told):
                objects = _objects(value)
                # Without the names of others that it may be one with.
                told = _shown(name, value)
            self._watched.append(
                _Watched(
                    expression=expression,
                    place=place,
                    name=name,
                    objects=objects,
                    told=told,
                )
            )

    def changed(self) -> dict[str, tuple[JsonValue, JsonValue]]:
        """What is not as recorded: by its expression what it was, and what it is now."""
        values, failed = self._lookups.read()
        found: dict[str, tuple[JsonValue, JsonValue]] = {}
        for watched in self._watched:
            value, missing = values[watched.place], watched.place in failed
            if watched.objects and not missing and _consists_of(value, watched.objects):
                continue
            now = UNREADABLE if missing else _shown(watched.name, value)
            if not alike(watched.told, now):
                found[watched.expression] = (watched.told, now)
        return found


def _consists_of(value: object, objects: list[object]) -> bool:
    if not isinstance(value, _CONTAINERS):
        return value is objects[0]
    found = _objects(value)
    return len(found) == len(objects) and all(map(is_, found, objects))


def _objects(value: object, depth: int = _DEEP) -> list[object]:
    """The value; of a container its type and what is in it, as what it is may be made anew."""
    if not depth or not isinstance(value, _CONTAINERS):
        return [value]
    found: list[object] = [type(value)]
    if isinstance(value, dict):
        found += value
    for item in value.values() if isinstance(value, dict) else value:
        found += _objects(item, depth - 1) if isinstance(item, _CONTAINERS) else (item,)
    return [*found, _END]


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


def is_of_the_tree(tree: ast.expr) -> bool:
    """Whether an expression reads the tables, tensors or hooks of a module of the model's tree.

    Also whether such a module has a forward of its own, which is one of its attributes.
    """
    match tree:
        case (
            ast.Attribute(value=owner, attr=name)
            | ast.Subscript(value=ast.Attribute(value=owner, attr=name))
        ) if name in (*_TABLES, *HOOKS):
            return is_in_the_tree(owner)
        case ast.Compare(left=ast.Constant(value="forward"), comparators=[ast.Call(args=[owner])]):
            return is_in_the_tree(owner)
    return False


def is_in_the_tree(node: ast.expr) -> bool:
    """Whether an expression goes from the model down its tree of modules."""
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value="self")):
            return True
        case ast.Subscript(value=ast.Attribute(value=owner, attr="_modules"), slice=ast.Constant()):
            return is_in_the_tree(owner)
    return False


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
