from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from vllmc.core.cache.key import REDACTED
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.models.described import class_digest
from vllmc.core.models.guarded import GuardedValues, read_guarded

TOKEN = "hf_" + "aB3" * 11


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Entry(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.scale = 2.0
        self.mode: Any = Mode.FAST
        self.table: Any = {"a": 1, "b": [True, None]}
        self.api_key = "hunter2"
        self.keys: Any = {}
        self.notes: Any = None
        self.long = "x" * 500
        self.row = torch.ones(3)
        self.rows = [torch.ones(2, 3).t(), self.row, torch.ones(1, requires_grad=True)]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("guarded_settings")
    module.GAIN = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "guarded_settings", module)
    return module


def read(expression: str) -> Any:
    return read_guarded([expression], Entry())[expression]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("L['self'].scale", 2.0),
        ("L['self'].mode", f"<{__name__}.Mode.FAST>"),
        ("L['self'].table", {"a": 1, "b": [True, None]}),
        ("L['self'].table['b'][-2]", True),
        ("dict.__getitem__(L['self'].table, list(dict.keys(L['self'].table))[0])", 1),
        ("L['self']._modules['linear'].in_features", 2),
        ("L['self']._modules['linear'].weight", "<self.linear.weight>"),
        ("L['self'].row", "<torch.float32 [3]>"),
        ("L['self'].rows[0]", "<torch.float32 [3, 2], strides [1, 3]>"),
        ("L['self'].rows[2]", "<torch.float32 [1], requires grad>"),
        ("hasattr(L['self'], 'scale')", True),
        ("hasattr(L['self'], 'scales')", False),
        ("'scale' in vars(L['self'])", True),
        ("L['self'].table is L['self'].table", True),
        ("L['self'].table is L['self'].mode", False),
        ("type(L['self'])", f"<class {__name__}.Entry#{class_digest(Entry)}>"),
        ("len(L['self'].table)", 2),
        ("object.__getattribute__(L['self'], 'scale')", 2.0),
        ("'a' in L['self'].table", True),
    ],
)
def test_what_an_expression_reads_is_told_in_json(expression: str, value: object) -> None:
    assert read(expression) == value


def test_a_global_is_read_where_it_stands_now(settings: Any) -> None:
    expression = "M['guarded_settings'].GAIN"
    assert read(expression) == 3
    settings.GAIN = 4
    assert read(expression) == 4


def test_a_long_value_is_a_digest() -> None:
    value = read("L['self'].long")
    assert value.startswith("sha256:")
    assert len(value) == len("sha256:") + 64


@pytest.mark.parametrize(
    "expression",
    [
        "L['self'].api_key",
        "vars(L['self'])['api_key']",
        "object.__getattribute__(L['self'], 'api_key')",
        "dict.__getitem__(vars(L['self']), 'api_key')",
        "L['self'].keys['api_key'][0]",
        "L['self'].keys",
        "list(L['self'].keys['api_key'])",
        "L['self'].notes",
        f"L['self'].keys['{TOKEN}']",
    ],
)
def test_of_a_secret_not_even_a_digest_is_told(expression: str) -> None:
    entry = Entry()
    entry.keys = {"api_key": ["hunter2"], TOKEN: 1}
    entry.notes = {"a": [f"--header={TOKEN}"]}
    [(told, value)] = read_guarded([expression], entry).items()
    assert value == REDACTED
    assert TOKEN not in told


def test_what_is_asked_about_a_secret_is_no_secret() -> None:
    assert read("type(L['self'].api_key)") == f"<class str#{class_digest(str)}>"
    assert read("len(L['self'].api_key)") == len("hunter2")


@pytest.mark.parametrize(
    "expression",
    [
        "L['self'].absent",
        "L['self'].table['absent']",
        "object.__getattribute__(L['self'], 'absent')",
        "object.__getattribute__(L['self'], L['self'].long)",
        "M['no_such_module_anywhere'].x",
        "__import__('sys').modules.clear()",
        "L['self'].table.clear()",
        "eval('1')",
        "[x for x in (1,)]",
        "L['other']",
    ],
)
def test_what_cannot_be_looked_up_is_unreadable_and_nothing_is_run(expression: str) -> None:
    entry = Entry()
    assert read_guarded([expression], entry) == {expression: UNREADABLE}
    assert entry.table


def test_functions_of_torch_are_told_as_others_may_have_replaced_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expression = "M['torch'].nn.functional.linear"
    assert read(expression) == "<function torch._C._nn.linear>"
    monkeypatch.setattr(torch.nn.functional, "linear", read)
    assert read(expression).startswith(f"<function {__name__}.read#")


def test_a_tensor_that_was_told_is_told_by_where() -> None:
    expressions = ["L['self'].row", "L['self'].rows[1]"]
    assert read_guarded(expressions, Entry()) == {
        "L['self'].row": "<torch.float32 [3]>",
        "L['self'].rows[1]": "<L['self'].row>",
    }


def watched(entry: Entry, *expressions: str) -> GuardedValues:
    return GuardedValues(read_guarded(expressions, entry), entry)


def make_adder(number: int) -> Any:
    return lambda x: x + number


@pytest.mark.parametrize(
    ("attribute", "value", "before", "after"),
    [
        ("scale", 3.0, 2.0, 3.0),
        ("scale", 2, 2.0, 2),
        ("mode", Mode.SLOW, f"<{__name__}.Mode.FAST>", f"<{__name__}.Mode.SLOW>"),
        ("table", {"a": 2}, {"a": 1, "b": [True, None]}, {"a": 2}),
        ("row", torch.ones(4), "<torch.float32 [3]>", "<torch.float32 [4]>"),
    ],
)
def test_a_value_that_is_set_anew_has_changed_until_it_is_as_before(
    attribute: str, value: object, before: object, after: object
) -> None:
    entry, expression = Entry(), f"L['self'].{attribute}"
    values = watched(entry, expression, "L['self'].long")
    assert values.changed() == {}
    old = getattr(entry, attribute)
    setattr(entry, attribute, value)
    assert values.changed() == {expression: (before, after)}
    assert values.changed() == {expression: (before, after)}
    setattr(entry, attribute, old)
    assert values.changed() == {}


def test_a_container_that_is_changed_in_place_has_changed() -> None:
    entry = Entry()
    values = watched(entry, "L['self'].table", "len(L['self'].table['b'])")
    entry.table["b"].append(3)
    assert values.changed() == {
        "L['self'].table": ({"a": 1, "b": [True, None]}, {"a": 1, "b": [True, None, 3]}),
        "len(L['self'].table['b'])": (2, 3),
    }


def test_what_is_made_anew_and_alike_has_not_changed() -> None:
    entry = Entry()
    entry.mode = make_adder(1)
    values = watched(entry, "L['self'].table", "L['self'].long", "L['self'].mode")
    entry.table = {"a": 1, "b": [True, None]}
    entry.long = "".join(["x"] * 500)
    entry.mode = make_adder(1)
    assert values.changed() == {}
    entry.mode = make_adder(2)
    assert [*values.changed()] == ["L['self'].mode"]


def test_a_value_that_is_gone_and_what_is_read_of_it_have_changed() -> None:
    entry = Entry()
    values = watched(entry, "L['self'].table", "type(L['self'].table['a'])", "L['self'].scale")
    del entry.table
    found = {expression: after for expression, (_, after) in values.changed().items()}
    assert found == {"L['self'].table": UNREADABLE, "type(L['self'].table['a'])": UNREADABLE}


def test_a_global_is_watched_where_it_stands(settings: Any) -> None:
    values = watched(Entry(), "M['guarded_settings'].GAIN")
    settings.GAIN = 5
    assert values.changed() == {"M['guarded_settings'].GAIN": (3, 5)}


def test_what_was_recorded_of_another_entry_has_changed_from_the_start() -> None:
    entry = Entry()
    entry.scale = 5.0
    values = GuardedValues(
        {"L['self'].scale": 2.0, "L['self'].mode": read("L['self'].mode")}, entry
    )
    assert values.changed() == {"L['self'].scale": (2.0, 5.0)}
    entry.scale = 2.0
    assert values.changed() == {}


def test_two_that_were_one_object_are_told_by_what_they_hold() -> None:
    entry = Entry()
    entry.notes = entry.table
    values = watched(entry, "L['self'].notes", "L['self'].table")
    entry.table = {"a": 2}
    assert values.changed() == {"L['self'].table": ({"a": 1, "b": [True, None]}, {"a": 2})}


def test_of_a_secret_not_even_the_change_is_told() -> None:
    entry = Entry()
    values = watched(entry, "L['self'].api_key", f"L['self'].keys['{TOKEN}']")
    entry.api_key = "hunter3"
    assert values.changed() == {}


def test_a_container_that_holds_the_same_in_another_order_has_changed() -> None:
    entry = Entry()
    entry.notes = [1, [2], 3]
    values = watched(entry, "L['self'].notes")
    entry.notes[:] = [1, [2, 3]]
    assert values.changed() == {"L['self'].notes": ([1, [2], 3], [1, [2, 3]])}
