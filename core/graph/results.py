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


@dataclasses.dataclass(frozen=True, slots=True)
class OutputMark:
    """Stands for output number `index` of a graph."""

    index: int


def describe(result: object, arguments: Mapping[int, int]) -> JsonValue:
    """`result` as JSON: literals as they are, all else as tagged objects.

    `{"output": i}` is an output of the graph (an `OutputMark`), `{"argument": i}` a tensor that the
    call brought, known by `id` in `arguments`. `{"call": [module, name], ...}` makes an object by
    its class, `{"object": [module, name], ...}` by its attributes. Raises `VllmcError`
    (`unsupported-model`) for what no record can hold.
    """

    def inner(value: object) -> JsonValue:
        return describe(value, arguments)

    match result:
        case OutputMark(index):
            return {"output": index}
        case torch.Tensor() if id(result) in arguments:
            return {"argument": arguments[id(result)]}
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
            "kwargs": {name: inner(getattr(result, name)) for name in fields},
        }
    if hasattr(result, "__dict__") and not isinstance(result, (torch.nn.Module, Mapping)):
        state = {name: inner(value) for name, value in vars(result).items()}
        return {"object": [*import_path(type(result))], "state": state}
    raise _unsupported(f"a {type(result).__name__}")


def _unsupported(what: str) -> VllmcError:
    return VllmcError(
        "unsupported-model",
        f"the forward returns {what}, and a record cannot hold that",
        hint="return tensors and numbers, in tuples, lists, dictionaries or dataclasses",
    )
