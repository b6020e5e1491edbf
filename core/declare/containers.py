"""Arguments that hold tensors: which those are, by the expressions that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import torch

from vllmc.core.declare.annotations import field_names


def leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """What lies in `value`, the container or not that `path` reads, each with its own path.

    In the order of the container, which for a mapping is that of insertion. What lies in a
    dataclass, a `NamedTuple` or an object with `tensors` is read by attribute (`batch.ids`), in
    another mapping by key (`hidden['residual']`), in a list or another tuple by index (`pair[0]`).
    Dynamo's name for it is the same with `L['batch']` for `batch`, checked with torch 2.11 and
    2.13, except in subclasses of `dict` and `list`, and for keys that are not literals.
    """
    parts = _parts(path, value)
    if parts is None:
        yield path, value
    for inner, item in parts or ():
        yield from leaves(inner, item)


def containers(path: str, value: object) -> Iterator[tuple[str, type]]:
    """The containers that `value` is or holds, with their classes, each with its own path."""
    parts = _parts(path, value)
    if parts is not None:
        yield path, type(value)
    for inner, item in parts or ():
        yield from containers(inner, item)


def _parts(path: str, value: object) -> list[tuple[str, object]] | None:
    """What a container holds, each with its own path; None where `value` is none."""
    if isinstance(value, torch.Tensor):
        return None
    if names := _fields(value):
        return [(f"{path}.{name}", getattr(value, name)) for name in names]
    if isinstance(value, Mapping):
        return [(f"{path}[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return None


def map_tensors(path: str, value: Any, make: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `make(path, tensor)` in the place of each tensor; containers are new ones."""
    if isinstance(value, torch.Tensor):
        return make(path, value)
    if names := _fields(value):
        held = {n: map_tensors(f"{path}.{n}", getattr(value, n), make) for n in names}
        if isinstance(value, tuple):
            return value._replace(**held)  # type: ignore[attr-defined]
        made = copy.copy(value)
        for name, item in held.items():
            object.__setattr__(made, name, item)
        return made
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = map_tensors(f"{path}[{key!r}]", item, make)
        return made
    if isinstance(value, MappingProxyType):
        held = {key: map_tensors(f"{path}[{key!r}]", item, make) for key, item in value.items()}
        return MappingProxyType(held)
    if isinstance(value, (list, tuple)):
        items = [map_tensors(f"{path}[{i}]", item, make) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _fields(value: object) -> tuple[str, ...]:
    names = tuple(name for name in field_names(type(value)) if hasattr(value, name))
    # Code may read whatever else lies beside the tensors.
    return tuple(vars(value)) if names == ("tensors",) and "tensors" in vars(value) else names
