"""What running a module's Python changed in it besides what it returned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def left_behind(entry: torch.nn.Module) -> Iterator[list[str]]:
    """Within it `entry` may be changed; afterwards it is as before.

    The list names the attributes that were changed, once the block has ended. Seen are attributes
    of the modules, and what was put into or taken out of lists, dictionaries and sets that are
    such.
    """
    before = [(name, module, _Attributes(module)) for name, module in entry.named_modules()]
    left: list[str] = []
    try:
        yield left
    finally:
        for name, module, attributes in before:
            prefix = f"self.{name}." if name else "self."
            left += [prefix + changed for changed in attributes.changed(module)]
            attributes.restore(module)


class _Attributes:
    """The attributes of a module, and shallow copies of the containers among them."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._values = dict(vars(module))
        self._copies = {
            name: copy.copy(value)
            for name, value in self._values.items()
            if type(value) in (list, dict, set)
        }

    def changed(self, module: torch.nn.Module) -> Iterator[str]:
        now = vars(module)
        for name in self._values.keys() | now.keys():
            value, before = now.get(name, _ABSENT), self._values.get(name, _ABSENT)
            held = self._copies.get(name)
            if value is not before or (held is not None and not _same(value, held)):
                yield name

    def restore(self, module: torch.nn.Module) -> None:
        vars(module).clear()
        vars(module).update(self._values)
        for name, before in self._copies.items():
            value = self._values[name]
            if not _same(value, before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)


_ABSENT = object()


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    if isinstance(a, set):
        return bool(a == b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
