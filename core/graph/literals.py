"""The arguments of an op as JSON, and back: how records and pieces on their way write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import VllmcError


def encode(value: object, names: Mapping[fx.Node, str]) -> JsonValue:
    """An argument of an op as JSON: literals as they are, everything else as a tagged object.

    Raises `VllmcError` (`unsupported-model`) for what has no such form.
    """
    match value:
        case fx.Node():
            return {"ref": names[value]}
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": value.hex()}
        case tuple():
            return {"tuple": [encode(v, names) for v in value]}
        case list():
            return {"list": [encode(v, names) for v in value]}
        case slice():
            return {"slice": [encode(v, names) for v in (value.start, value.stop, value.step)]}
        case torch.dtype() | torch.device() | torch.memory_format() | torch.layout():
            return {"torch": str(value).removeprefix("torch."), "of": type(value).__name__}
        case _ if value is ...:
            return {"ellipsis": True}
        case _:
            raise VllmcError(
                "unsupported-model",
                f"a splitting op takes an argument of type {type(value).__name__}, "
                "which a record cannot hold",
                hint="leave this op out of --splitting-op",
            )


def decode(value: JsonValue, values: Mapping[str, Any]) -> Any:
    """What `encode` wrote, with `values` in the places of the names."""
    match value:
        case {"ref": str(name)}:
            return values[name]
        case {"tuple": list(items)}:
            return tuple(decode(item, values) for item in items)
        case {"list": list(items)}:
            return [decode(item, values) for item in items]
        case {"slice": list(items)}:
            return slice(*(decode(item, values) for item in items))
        case dict():
            return decode_constant(value)
    return value


def decode_constant(value: Mapping[str, JsonValue]) -> object:
    """The literal behind a tagged object that holds no other value."""
    match value:
        case {"float": str(text)}:
            return float.fromhex(text)
        case {"ellipsis": True}:
            return ...
        case {"torch": str(name), "of": "device"}:
            return torch.device(name)
        case {"torch": str(name)}:
            return getattr(torch, name)
    raise AssertionError(f"no argument is encoded as {value}")
