"""Python values and code told in JSON, so that two that differ to a program are told differently.

What JSON has no word for stands in angle brackets: `"<torch.float16>"`, `{"<tuple>": [1, 2]}`.
Functions and classes are told by their names and a digest of their bytecode: where a name is
defined twice, or replaced by an import, the source file and the name remain what they are.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Iterable
from enum import Enum
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Final

import torch

from vllmc.core.cache.key import JsonValue, canonical_json, sha256_hex

_DEEP: Final = 6
_DIGITS: Final = 16


def describe(value: object, depth: int = _DEEP) -> JsonValue:
    """`value` in JSON; of objects the class, whose attributes are for others to read.

    What lies deeper than `depth` is told by its class alone.
    """
    kind = type(value)
    if value is None or kind in (bool, int):
        return value  # type: ignore[return-value]
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else f"<{value!r}>"
    if isinstance(value, str) and kind is str:
        # Nothing else that begins so is a text.
        return f"<str {value}>" if value.startswith("<") else value
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _container(value, depth - 1) if depth else f"<{_qualified(kind)}>"
    match value:
        case torch.Tensor():
            return f"<{value.dtype} {list(value.shape)}{_layout(value)}>"
        case torch.dtype() | torch.device() | torch.layout() | bytes() | complex() | range():
            return f"<{value!r}>"
        case Enum():
            return f"<{_qualified(kind)}.{value.name}>"
        case int() | float() | str():
            return f"<{_qualified(kind)} {value!r}>"
        case ModuleType():
            # A package is given a name for each of its modules that anybody imports, a namespace
            # of torch's ops for each op that anybody asks for.
            grows = hasattr(value, "__path__") or isinstance(value, type(torch.ops.aten))
            defined = "" if grows else _names(vars(value))
            return f"<module {value.__name__}{defined}>"
        case type():
            names = "" if _is_torchs(value) else _names(vars(value))
            return f"<class {_qualified(value)}#{class_digest(value)}{names}>"
        case FunctionType():
            digest = _function_digest(value, depth)
            return f"<function {_qualified(value)}#{digest}{_names(vars(value))}>"
        case MethodType():
            return {"<method>": [describe(value.__func__, depth), describe(value.__self__, depth)]}
        case functools.partial():
            parts = (value.func, value.args, value.keywords)
            return {"<partial>": [describe(part, depth - 1) for part in parts] if depth else []}
        case BuiltinFunctionType():
            name = f"<function {_qualified(value)}>"
            owner = value.__self__
            plain = owner is None or isinstance(owner, ModuleType) or not depth
            return name if plain else {"<method>": [name, describe(owner, depth - 1)]}
    # The object's class, and the name of what has one: an op, a function of an extension.
    own = _own_name(value, "__qualname__") or _own_name(value, "__name__")
    named = f" {own}" if own else ""
    return f"<{_qualified(kind)}{named}#{class_digest(kind)}{_names(_attributes(value))}>"


def _names(attributes: Iterable[str]) -> str:
    """A digest of the names that there are: code may ask whether there is one."""
    names = sorted(name for name in attributes if not name.startswith("__"))
    return f"#{sha256_hex(canonical_json(names))[:_DIGITS]}" if names else ""


def _layout(tensor: torch.Tensor) -> str:
    """What distinguishes a tensor from others of its dtype and shape, other than its values."""
    strides = "" if tensor.is_contiguous() else f", strides {list(tensor.stride())}"
    return strides + (", requires grad" if tensor.requires_grad else "")


def _attributes(value: object) -> Iterable[str]:
    # Torch's own objects come by some as they are used: an op by its overloads.
    if _is_torchs(type(value)) or inspect.getattr_static(value, "__dict__", None) is None:
        return ()
    return vars(value)


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins")


def _own_name(value: object, attribute: str) -> str | None:
    """A name that an object was given; a class's own way to look up attributes is not asked."""
    name = inspect.getattr_static(value, attribute, None)
    if isinstance(name, (GetSetDescriptorType, MemberDescriptorType)):
        name = getattr(value, attribute, None)
    return name if isinstance(name, str) else None


def class_digest(cls: type) -> str:
    """A digest of the code of `cls` and its bases: of every function that is defined in them.

    Python's own classes are told by their names. Of torch's, whose version tells the rest, only
    what others replace counts: Transformers adds methods to `torch.nn.Module` as it goes along.
    """
    told = [[_qualified(base), sorted(_members(base))] for base in cls.__mro__]
    return sha256_hex(canonical_json(told))[:_DIGITS]


def _members(cls: type) -> Iterable[list[str]]:
    root = cls.__module__.partition(".")[0]
    members = () if root == "builtins" else vars(cls).items()
    for name, member in members:
        if root == "torch" and name not in ("forward", "__call__"):
            continue
        for function in _functions(member):
            yield [name, code_digest(function.__code__)]
            if isinstance(wrapped := inspect.unwrap(function), FunctionType):
                yield [name, code_digest(wrapped.__code__)]


def _functions(member: object) -> list[FunctionType]:
    match member:
        case FunctionType():
            return [member]
        case staticmethod() | classmethod():
            return _functions(member.__func__)
        case property():
            return [f for f in (member.fget, member.fset) if isinstance(f, FunctionType)]
        case functools.cached_property():
            return _functions(member.func)
    return []


@functools.lru_cache(maxsize=8192)
def code_digest(code: CodeType) -> str:
    """A digest of bytecode, which does not change with its place in a file or the file's place."""
    return sha256_hex(canonical_json(_code(code)))


def _code(code: CodeType) -> JsonValue:
    return [
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags],
        code.co_code.hex(),
        code.co_exceptiontable.hex(),
        [_constant(constant) for constant in code.co_consts],
        [*code.co_names],
        [*code.co_varnames],
        [*code.co_freevars],
        [*code.co_cellvars],
    ]


def _constant(constant: object) -> JsonValue:
    match constant:
        case CodeType():
            return _code(constant)
        case tuple():
            return [_constant(item) for item in constant]
        case frozenset():
            return sorted((_constant(item) for item in constant), key=json.dumps)
    return [type(constant).__name__, repr(constant)]


def _function_digest(function: FunctionType, depth: int) -> str:
    """Of its code, its default arguments, and the values that it closes over."""
    values: list[JsonValue] = []
    if depth:
        for value in (function.__defaults__, function.__kwdefaults__):
            values.append(describe(value, depth - 1))
        for cell in function.__closure__ or ():
            try:
                values.append(describe(cell.cell_contents, depth - 1))
            except ValueError:
                values.append("<empty>")
    told = [code_digest(function.__code__), values]
    return sha256_hex(canonical_json(told))[:_DIGITS]


def _container(
    value: list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any] | dict[Any, Any], depth: int
) -> JsonValue:
    name = f"<{_qualified(type(value))}>"
    if isinstance(value, dict):
        told = {key: describe(item, depth) for key, item in value.items()}
        plain = all(type(key) is str and not key.startswith("<") for key in told)
        # A dictionary in JSON has no order, and a program may go by it.
        if type(value) is dict and plain and [*told] == sorted(told):
            return told
        # Each item on its own, by its name where it has one: some names are those of secrets.
        return {
            name: [
                {key: item} if type(key) is str else [describe(key, depth), item]
                for key, item in told.items()
            ]
        }
    items = [describe(item, depth) for item in value]
    if isinstance(value, (set, frozenset)):
        items.sort(key=json.dumps)
    return items if type(value) is list else {name: items}


def _qualified(named: Any) -> str:
    # A method that is built in belongs to no module.
    module = getattr(named, "__module__", None)
    name = str(getattr(named, "__qualname__", type(named).__qualname__))
    return name if module in (None, "builtins") else f"{module}.{name}"
