"""The layers of a model, and which of them look alike before anything is traced."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from vllmc.core.graph.normalize import strides_of
from vllmc.core.models.guarded import HOOKS
from vllmc.core.torch_compat.stand_ins import owner_of_forward

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Modules that repeat, by path below the entry, and the number of the first one like each.

    A layer that is like no other before it is its own first.
    """

    paths: tuple[str, ...]
    modules: tuple[torch.nn.Module, ...]
    first: tuple[int, ...]

    @property
    def models(self) -> dict[int, int]:
        """The layers that need not be traced, and which is traced in their stead."""
        return {number: first for number, first in enumerate(self.first) if number != first}

    def group(self, first: int) -> list[int]:
        """The layers that are like `first`, itself included."""
        return [number for number, model in enumerate(self.first) if model == first]

    def regrouped(self, tell: Callable[[int], Hashable]) -> Layers:
        """With layers that `tell` tells apart no longer taken for alike."""
        seen: dict[Hashable, int] = {}
        first = tuple(
            seen.setdefault((old, tell(number)), number) for number, old in enumerate(self.first)
        )
        return replace(self, first=first)


def find_layers(entry: torch.nn.Module) -> Layers:
    """The members of all lists of modules that lie in no other list, grouped by what they are."""
    paths: list[str] = []
    modules: list[torch.nn.Module] = []
    first: list[int] = []
    for path, members in _lists(entry):
        looks = _looks(members)
        seen: dict[Hashable, int] = {}
        for name, module in members.items():
            first.append(seen.setdefault(looks[name], len(modules)))
            paths.append(f"{path}.{name}")
            modules.append(module)
    layers = Layers(paths=tuple(paths), modules=tuple(modules), first=tuple(first))
    owners = {number: owner_of_forward(type(module)) for number, module in enumerate(modules)}
    shown = {owners[number] for number in layers.models}
    # A forward that calls the one of its base is that of a layer, and the base's is not.
    base = {owner for owner in shown for other in shown - {owner} if issubclass(other, owner)}
    return layers.regrouped(lambda number: number if owners[number] in base else None)


def _lists(entry: torch.nn.Module) -> Iterator[tuple[str, dict[str, torch.nn.Module]]]:
    times = Counter(map(id, _held(entry)))
    done: tuple[str, ...] = ()
    for path, module in entry.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or path.startswith(done):
            continue
        done = (*done, f"{path}.")
        # Of what is found in two places Dynamo names one only. In layers of one form that is the
        # same place below each, as long as no tensor is that of another layer too.
        members = dict(module.named_children())
        if all(_is_whole(member, times) for member in members.values()):
            yield path, members


def _is_whole(layer: torch.nn.Module, times: Mapping[int, int]) -> bool:
    """Whether all that a layer holds is held by it alone, and each module of it once."""
    own = Counter(map(id, _held(layer)))
    modules = [id(module) for module in layer.modules()]
    return all(times[held] == count for held, count in own.items()) and all(
        own[module] <= 1 for module in modules
    )


def _held(module: torch.nn.Module) -> Iterator[object]:
    """The modules and tensors in a tree of modules, each as often as some module holds it."""
    for owner in module.modules():
        tables = (owner._modules, owner._parameters, owner._buffers)
        yield from (held for table in tables for held in table.values() if held is not None)


def _looks(members: Mapping[str, torch.nn.Module]) -> dict[str, Hashable]:
    """What each layer looks like, without what no two of them share, such as their number."""
    values = {name: dict(_values(member)) for name, member in members.items()}
    told: dict[Hashable, set[Hashable]] = defaultdict(set)
    for found in values.values():
        for place, value in found.items():
            told[place].add(value)
    own = {place for place, all_ in told.items() if len(all_) == len(members) > 1}
    return {
        name: (
            _form(members[name]),
            frozenset((place, value) for place, value in found.items() if place not in own),
        )
        for name, found in values.items()
    }


def _values(layer: torch.nn.Module) -> Iterator[tuple[Hashable, Hashable]]:
    """The attributes of a layer's modules that are plain values, by place."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if type(value) in _PLAIN:
                yield (path, name), (type(value), value)


def _form(layer: torch.nn.Module) -> Hashable:
    """The classes of a layer's modules, and the form of its tensors; of one held twice also where.

    Where a layer has hooks, or a module of it a method of its own, it is like no other.
    """
    modules = dict(layer.named_modules())
    own = (*HOOKS, "forward", "named_parameters", "named_buffers")
    if any(vars(module).get(name) for module in modules.values() for name in own):
        return id(layer)
    places: dict[int, tuple[str, str]] = {}
    return tuple(
        (
            path,
            type(module),
            *(
                (n, look(t), None if t is None else places.setdefault(id(t), (path, n)))
                for n, t in (module._parameters | module._buffers).items()
            ),
        )
        for path, module in modules.items()
    )


def look(value: Any) -> Hashable:
    """What a tensor is, but for its contents, or a symbolic number; of another value its type."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(value), value.node.expr
    if not isinstance(value, torch.Tensor):
        return type(value).__qualname__
    return (
        *(type(value), value.dtype, value.device, value.layout, value.requires_grad),
        *strides_of(value),
    )
