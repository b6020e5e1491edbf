"""Config values as JSON that is the same in every process, on every machine, for every user."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllmc.core.cache.key import JsonValue


def canonical(value: JsonValue) -> str:
    """One text per value, to compare and sort by: `1`, `1.0` and `true` differ."""
    return json.dumps(value, sort_keys=True)


def stable(value: Any) -> JsonValue:
    """`value` as JSON that holds no id, no address and no absolute path.

    An absolute path becomes `path:<SHA-256>`. A function or class becomes its qualified name and
    the SHA-256 of its source, so that a changed custom pass is another value; what has a `uuid()`
    (torch's custom passes, `torch._inductor.custom_graph_pass`) counts by that. Any other object
    is its class and its attributes.
    """
    if isinstance(value, Enum):
        return stable(value.value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, str):
        return f"path:{_sha256(value)}" if PurePath(value).is_absolute() else value
    if isinstance(value, (bytes, bytearray)):
        return f"bytes:{value.hex()}"
    if isinstance(value, (list, tuple)):
        return [stable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((stable(item) for item in value), key=canonical)
    if isinstance(value, dict):
        return {_key(key): stable(item) for key, item in value.items()}
    return _object(value)


def _object(value: Any) -> JsonValue:
    # What torch prints by a name of its own: ops, types, layouts.
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch._ops.OperatorBase)):
        return str(value)
    if isinstance(value, functools.partial):
        return {
            "partial": stable(value.func),
            "arguments": stable(value.args),
            "keywords": stable(value.keywords),
        }
    if isinstance(value, type) or inspect.isroutine(value):
        return _named(value)
    uuid = getattr(value, "uuid", None)
    if callable(uuid):
        return {"class": _named(type(value), source=False), "uuid": stable(uuid())}
    return {"class": _named(type(value)), "attributes": stable(getattr(value, "__dict__", {}))}


def _named(value: type | Callable[..., object], *, source: bool = True) -> str:
    name = f"{value.__module__}.{value.__qualname__}"
    if not source:
        return name
    try:
        return f"{name}#{_sha256(inspect.getsource(value))}"
    except (OSError, TypeError):
        # Built in, or made at run time: nothing but the name is known.
        return name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(key: Any) -> str:
    text = stable(key)
    return text if isinstance(text, str) else canonical(text)
