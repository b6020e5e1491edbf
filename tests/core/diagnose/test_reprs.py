from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.diagnose.reprs import value_of, without_addresses


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("0.5", 0.5),
        ("None", None),
        ("", ""),
        ("ATEN,TRITON", "ATEN,TRITON"),
        ("(None, 'g++')", [None, "g++"]),
        ("{'pre_grad': False, 'precision': 0.0001}", {"pre_grad": False, "precision": 0.0001}),
        ("BoxedBool(value=False)", {"value": False}),
        (
            "f(a=(1, 2), b=g(c='x, y', d=torch.f))",
            {"a": [1, 2], "b": {"c": "x, y", "d": "torch.f"}},
        ),
        ("torch.Size([4, 4])", "torch.Size([4, 4])"),
        ("(0, [Local(name='x')])", [0, [{"name": "x"}]]),
        ("<function f at 0x7f00deadbeef>", "<function f>"),
        ("{1, 2}", [1, 2]),
        ("1e999", "1e999"),
        ("b'x'", "b'x'"),
        (r"'\d'", r"\d"),
    ],
)
def test_a_value_is_read_from_what_python_printed(text: str, value: Any) -> None:
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


def test_addresses_are_left_out() -> None:
    text = "<function f at 0x7f00> and <object at 0xdeadbeef>"
    assert without_addresses(text) == "<function f> and <object>"


@pytest.mark.parametrize("text", ["(" * 3000, "f(a=" * 3000, "[" * 50 + "x" + "]" * 50])
def test_what_is_nested_too_deeply_stays_text(text: str) -> None:
    assert isinstance(json.dumps(value_of(text)), str)


@given(st.text(alphabet="(){}[]=,'\" \\af01.-\x00\ud800", max_size=60))
def test_any_text_has_a_value_that_is_json(text: str) -> None:
    assert json.loads(json.dumps(value_of(text), allow_nan=False)) == value_of(text)
