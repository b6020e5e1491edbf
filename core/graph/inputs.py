"""Where each input of a captured graph comes from, in a form that a record can keep."""

from __future__ import annotations

import re
from collections.abc import Container

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import GraphInput

_LOCAL = re.compile(r"^L\['(?P<name>\w+)'\]")
_SIZE = re.compile(r"^(?P<path>.+)\.size\(\)\[(?P<dim>\d+)\]$")
_STEP = re.compile(
    r"\._(?:modules|parameters|buffers)\['(?P<member>[^']+)'\]"
    r"|\.(?P<attribute>[A-Za-z_]\w*)"
    r"|\[(?P<index>\d+)\]"
    r"|\['(?P<key>[^']+)'\]"
)


def read_source(source: str, arguments: Container[str] = (), *, root: str = "self") -> GraphInput:
    """Reads Dynamo's source expression of a placeholder; `arguments` are the call's by path.

    Raises `VllmcError` (`unsupported-model`) for a source that no later process can find again,
    such as a global tensor.
    """
    local = _LOCAL.match(source)
    if local is None:
        raise _unsupported(source)
    rest = source[local.end() :]
    if local["name"] != root:
        path = local["name"] + rest
        if path in arguments:
            return GraphInput(kind="activation", name=path)
        if (size := _SIZE.match(path)) and size["path"] in arguments:
            return GraphInput(kind="size", name=size["path"], dim=int(size["dim"]))
        raise _unsupported(source)
    steps: list[str] = []
    position = 0
    while position < len(rest):
        step = _STEP.match(rest, position)
        if step is None:
            raise _unsupported(source)
        steps.append(next(value for value in step.groups() if value is not None))
        position = step.end()
    return GraphInput(kind="attribute", name=".".join(steps))


def find_attribute(module: object, path: str) -> object:
    """The object at the dotted `path` below `module`: attributes, indices and keys alike.

    Raises `KeyError` when there is none.
    """
    found = module
    for step in path.split("."):
        if hasattr(found, step):
            found = getattr(found, step)
        elif isinstance(found, (list, tuple)) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, dict) and step in found:
            found = found[step]
        else:
            raise KeyError(path)
    return found


def _unsupported(source: str) -> VllmcError:
    return VllmcError(
        "unsupported-model",
        f"the graph reads {source}, which is neither an argument nor held by the module",
        context={"source": source},
        hint="make it a parameter, a buffer or an attribute of the module",
    )
