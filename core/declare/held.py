"""What a program is bound to: whether a module still holds the tensors and modules that it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

_TABLES: Final = ("_parameters", "_buffers", "_modules")


class Held:
    """The tensors and modules in `module`'s tree, and its own attributes, as they are now."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._own = vars(module)
        self._count = len(self._own)
        self._entries = tuple(_entries(module))

    def is_there(self) -> bool:
        """Whether all of them still are: 25 ns for each, as this is asked at every call.

        What is written into a tensor, also by `tensor.data = other`, plays no part here, nor do
        attributes of the modules inside.
        """
        if len(self._own) != self._count:
            return False
        try:
            for table, name, value in self._entries:
                if table[name] is not value:
                    return False
        except KeyError:
            return False
        return True


def _entries(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, object]]:
    own = vars(module)
    for name, value in own.items():
        # Whether it is in training makes a kind of call of its own.
        if name != "training":
            yield own, name, value
    for inner in module.modules():
        for table in (vars(inner)[name] for name in _TABLES):
            for name, value in table.items():
                yield table, name, value
