from __future__ import annotations

import collections
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.models.described import class_digest, describe

Named = collections.namedtuple("Named", ["x"])

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.floats(),
        st.sampled_from(["", "a", "1", "<", "<x>", "nan", "torch.float32", "None"]),
        st.sampled_from([torch.float32, torch.float16, torch.device("cpu"), b"a", 1j, range(2)]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        inner.map(Named),
        st.dictionaries(st.sampled_from(["a", "b", "1", "<a>", 1, None]), inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), inner).map(collections.OrderedDict),
    ),
    max_leaves=5,
)


def text(value: object) -> str:
    return json.dumps(describe(value, 30), sort_keys=True)


def same(a: Any, b: Any) -> bool:
    """Whether no program can tell `a` from `b`."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        both = math.isnan(a) and math.isnan(b)
        return both or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(values, values)
def test_values_are_told_alike_just_when_no_program_can_tell_them_apart(a: Any, b: Any) -> None:
    assert (text(a) == text(b)) == same(a, b)


@given(values)
def test_a_value_is_told_in_json_in_the_same_words_each_time(value: Any) -> None:
    assert json.loads(text(value)) == describe(value, 30)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1, 2.5, "a", None, True], [1, 2.5, "a", None, True]),
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}),
        ({"b": 1, "a": 2}, {"<dict>": [{"b": 1}, {"a": 2}]}),
        ({1: 2}, {"<dict>": [[1, 2]]}),
        ((1,), {"<tuple>": [1]}),
        ({"b", "a"}, {"<set>": ["a", "b"]}),
        (torch.float16, "<torch.float16>"),
        (torch.zeros(2, 3), "<torch.float32 [2, 3]>"),
        (torch, "<module torch>"),
        (len, "<function len>"),
    ],
)
def test_what_is_told_can_be_read(value: object, told: object) -> None:
    assert describe(value) == told


def adder(amount: int) -> Callable[[int], int]:
    return lambda x: x + amount


def with_default(amount: int) -> Callable[..., int]:
    def add(x: int, *, amount: int = amount) -> int:
        return x + amount

    return add


def of_class(amount: int) -> type:
    class Made:
        @property
        def size(self) -> int:
            return 2 if amount else 3

    class Other:
        @property
        def size(self) -> int:
            return 4

    return Made if amount == 1 else Other


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((lambda x: x + 1), (lambda x: x + 2)),
        ((lambda x: x in {"a", "b"}), (lambda x: x in {"a", "c"})),
        (adder(1), adder(2)),
        (with_default(1), with_default(2)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (functools.partial(max, default=1), functools.partial(max, default=2)),
        ([1].append, [2].append),
        (of_class(1), of_class(2)),
        (torch.ops.aten.relu.default, torch.ops.aten.silu.default),
        (torch.sin, torch.cos),
    ],
)
def test_code_of_another_effect_is_told_differently(one: object, other: object) -> None:
    assert text(one) != text(other)


def test_code_is_told_alike_wherever_it_stands() -> None:
    for make in (adder, with_default):
        assert text(make(1)) == text(make(1))
    source = "def f(x):\n    return [y for y in x if y in {'a', 'b', 'c'}]\n"
    here: dict[str, Any] = {"__name__": "m"}
    there: dict[str, Any] = {"__name__": "m"}
    exec(compile(source, "/a/m.py", "exec"), here)
    exec(compile("\n\n" + source, "/b/m.py", "exec"), there)
    assert text(here["f"]) == text(there["f"])


def test_code_is_told_alike_in_every_process() -> None:
    program = (
        "import torch\n"
        "from vllmc.core.models.described import class_digest\n"
        "print(class_digest(torch.nn.TransformerEncoderLayer))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert told == {class_digest(torch.nn.TransformerEncoderLayer)}


def test_a_replaced_method_changes_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(torch.nn.Linear):
        pass

    before = class_digest(Block)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    assert class_digest(Block) != before
    monkeypatch.undo()
    assert class_digest(Block) == before


def test_a_method_that_others_add_to_every_module_changes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = class_digest(torch.nn.Linear)
    monkeypatch.setattr(torch.nn.Module, "added", lambda self: None, raising=False)
    assert class_digest(torch.nn.Linear) == before


def test_what_closes_over_itself_is_told() -> None:
    def again(x: int) -> int:
        return again(x - 1) if x else 0

    assert text(again) == text(again)
