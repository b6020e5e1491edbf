"""What a forward returns, as a value that a record can keep: containers around the graph's outputs.

A program returns what the module does: tensors in tuples, lists, dictionaries, dataclasses, named
tuples and objects that hold nothing but attributes. `program.link` builds them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum

import torch

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import VllmcError
from vllmc.core.graph.targets import import_path


class NumberMark:
    """Stands for an output of a graph that is a number."""


def describe(result: object, known: Mapping[int, JsonValue]) -> JsonValue:
    """`result` as JSON: literals as they are, all else as tagged objects.

    What it holds of the objects in `known`, by `id`, is told as said there: `{"output": i}` for
    what stands for an output of the graph, `{"argument": i}` for a tensor of the call.
    `{"call": [module, name], ...}` makes an object by its class, `{"object": [module, name], ...}`
    by its attributes. Names are in lists, so that none can be taken for a tag. Raises `VllmcError`
    (`unsupported-model`) for what no record can hold.
    """

    def inner(value: object) -> JsonValue:
        return describe(value, known)

    if id(result) in known:
        return known[id(result)]
    match result:
        case torch.Tensor():
            raise _unsupported("a tensor that it did not compute")
        case Enum():
            raise _unsupported(f"a {type(result).__name__}")
        case None | bool() | int() | str():
            return result
        case float():
            return {"float": result.hex()}
        case torch.dtype() | torch.device():
            return {"torch": str(result).removeprefix("torch."), "of": type(result).__name__}
        case tuple() if hasattr(result, "_fields"):
            return {"call": [*import_path(type(result))], "args": [*map(inner, result)]}
        case tuple() if type(result) is tuple:
            return {"tuple": [*map(inner, result)]}
        case list() if type(result) is list:
            return {"list": [*map(inner, result)]}
        case dict() if type(result) is dict:
            return {"dict": [[inner(key), inner(value)] for key, value in result.items()]}
    if isinstance(result, type):
        raise _unsupported("a class")
    if dataclasses.is_dataclass(result):
        fields = [field.name for field in dataclasses.fields(result) if field.init]
        return {
            "call": [*import_path(type(result))],
            "kwargs": [[name, inner(getattr(result, name))] for name in fields],
        }
    if hasattr(result, "__dict__") and not isinstance(result, (torch.nn.Module, Mapping)):
        state: list[JsonValue] = [[name, inner(value)] for name, value in vars(result).items()]
        return {"object": [*import_path(type(result))], "state": state}
    raise _unsupported(f"a {type(result).__name__}")


def _unsupported(what: str) -> VllmcError:
    return VllmcError(
        "unsupported-model",
        f"the forward returns {what}, and a record cannot hold that",
        hint="return tensors and numbers, in tuples, lists, dictionaries or dataclasses",
    )
