from __future__ import annotations

from typing import Any

import pytest
import torch

from vllmc.core.errors import UnsafeCacheError
from vllmc.core.graph.layout import Argument, Layout
from vllmc.core.models.guarded import read_guarded
from vllmc.core.runtime.guards import GuardCheck


class Entry(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.step


def layout(*promises: str) -> Layout:
    return Layout(
        arguments=(
            Argument(path="x", dtype="float32", shape=(1, "tokens")),
            Argument(path="held['y']", dtype="float32", shape=("tokens", "rows")),
        ),
        pieces=(),
        ranges=("1:64",),
        inputs=(),
        steps=(),
        result=None,
        attention=(),
        promises=promises,
    )


def check(*promises: str, entry: Entry | None = None) -> GuardCheck:
    entry = entry or Entry()
    return GuardCheck(layout(*promises), read_guarded(["L['self'].step"], entry), entry)


def rows(guards: GuardCheck) -> list[tuple[Any, ...]]:
    return [(row.guard, row.klass, row.observed, row.count) for row in guards.broken]


def test_a_promise_is_held_against_the_sizes_of_each_call() -> None:
    guards = check("(d0 % 8) != 0", "d0 < 2 * d1")
    for sizes in ([17, 9], [16, 9], [24, 15], [8, 4]):
        guards(sizes)
    [eight, relation] = rows(guards)
    assert eight == ("x.size()[1] % 8 != 0", "shape", "16", 3)
    guard = "x.size()[1] < 2 * held['y'].size()[1]"
    assert relation == (guard, "shape", "x.size()[1] = 8, held['y'].size()[1] = 4", 1)


def test_the_rows_name_the_forward_that_was_captured() -> None:
    guards = check("d0 != 3")
    guards([3, 1])
    line = Entry.forward.__code__.co_firstlineno
    assert [row.frame for row in guards.broken] == [f"test_guards.py:{line} in forward"]


def test_a_value_is_held_against_the_record_at_each_call() -> None:
    entry = Entry()
    guards = check(entry=entry)
    for step in (0, 1, 2, 0):
        entry.step = step
        guards([1, 1])
    assert rows(guards) == [("self.step == 0", "int", "1", 2)]


def test_nothing_is_broken_where_all_holds() -> None:
    guards = check("d0 < 2 * d1")
    guards([4, 4])
    assert guards.broken == ()


def test_a_record_with_what_is_no_condition_is_refused() -> None:
    with pytest.raises(UnsafeCacheError, match="cannot evaluate"):
        check("__import__('os')")
