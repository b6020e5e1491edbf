"""The conditions that capture assumed, evaluated while a program runs.

A linked program has no guards: a call that breaks one gives what the captured graph gives. All that
is needed is in the program's record, and Dynamo is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch

from vllmc.core.cache.expressions import most_telling
from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.dropped import size_guard, value_guard
from vllmc.core.diagnose.guards import Guard
from vllmc.core.diagnose.recompiles import Recompile, frame_name, tally
from vllmc.core.graph.layout import Layout
from vllmc.core.models.guarded import GuardedValues
from vllmc.core.runtime.conditions import read_by, read_condition, spoken


class GuardCheck:
    """Sees which guards each call breaks, of those that were dropped.

    They are the promises of `layout`, and the Python values that the capture depended on, as
    `guarded` of the program's record has them and as `entry` has them now.
    """

    def __init__(
        self, layout: Layout, guarded: Mapping[str, JsonValue], entry: torch.nn.Module
    ) -> None:
        self._frame = _frame(entry)
        names = [_first_place(layout, size) for size in layout.sizes]
        self._promises = [
            (
                spoken(text, names),
                read_condition(text, len(names)),
                {names[place]: place for place in read_by(text)},
            )
            for text in layout.promises
        ]
        self._values = GuardedValues(guarded, entry)
        self._broken: list[Guard] = []

    def __call__(self, sizes: Sequence[int]) -> None:
        """Looks at a call before it runs; `sizes` are those of the layout."""
        for text, holds, places in self._promises:
            if not holds(*sizes):
                found = {name: sizes[place] for name, place in places.items()}
                self._broken.append(size_guard(text, found))
        if changed := self._values.changed():
            self._broken += [value_guard(e, *changed[e]) for e in most_telling([*changed])]

    @property
    def broken(self) -> tuple[Recompile, ...]:
        """One row for each guard that calls have broken until now, and how many did."""
        return tally(self._frame, self._broken)


def _first_place(layout: Layout, size: str) -> str:
    """Where a size stands first, as a guard spells it: `x.size()[0]`."""
    return next(
        f"{argument.path}.size()[{argument.shape.index(size)}]"
        for argument in layout.arguments
        if size in argument.shape
    )


def _frame(entry: torch.nn.Module) -> str:
    """The forward that the user knows: not that of the module which calls it for the engine."""
    from vllmc.core.models.building import model_of

    forward = inspect.unwrap(type(model_of(entry)).forward)
    code = forward.__code__
    return frame_name(code.co_filename, code.co_firstlineno, code.co_name)
