from __future__ import annotations

import pytest

from vllmc.core.cache.key import REDACTED, JsonValue
from vllmc.core.cache.record import UNREADABLE
from vllmc.core.diagnose.dropped import size_guard, value_guard
from vllmc.core.diagnose.recompiles import tally

FRAME = "model.py:12 in forward"
DIGEST = "#0123456789abcdef"


@pytest.mark.parametrize(
    ("condition", "sizes", "klass", "expected", "observed"),
    [
        ("x.size()[1] % 8 != 0", {"x.size()[1]": 16}, "shape", "x.size()[1] % 8 != 0", "16"),
        ("x.size()[0] != 1", {"x.size()[0]": 1}, "shape-0-1", "x.size()[0] != 1", "1"),
        (
            "x.size()[0] < 2 * y.size()[0]",
            {"x.size()[0]": 8, "y.size()[0]": 4},
            "shape",
            "x.size()[0] < 2 * y.size()[0]",
            "x.size()[0] = 8, y.size()[0] = 4",
        ),
    ],
)
def test_a_condition_on_sizes_is_told_with_the_sizes_that_break_it(
    condition: str, sizes: dict[str, int], klass: str, expected: str, observed: str
) -> None:
    guard = size_guard(condition, sizes)
    assert (guard.text, guard.klass) == (condition, klass)
    assert guard.subject == next(iter(sizes))
    assert (guard.expected, guard.observed) == (expected, observed)


@pytest.mark.parametrize(
    ("expression", "before", "after", "klass", "text", "observed"),
    [
        ("M['pkg.mod'].COUNT", 0, 3, "int", "pkg.mod.COUNT == 0", "3"),
        ("len(L['self'].rows)", 2, 3, "int", "len(self.rows) == 2", "3"),
        ("L['self'].scale", 1.5, 2.0, "other", "self.scale == 1.5", "2.0"),
        ("L['self'].on", True, False, "other", "self.on == True", "False"),
        ("L['self'].k", 1, True, "type", "self.k == 1", "True"),
        ("L['self'].k", None, 1, "type", "self.k is None", "1"),
        ("L['self'].k", 1, None, "type", "self.k == 1", "None"),
        ("L['self'].mode", "fast", "slow", "string", "self.mode == 'fast'", "'slow'"),
        ("L['self'].mode", "<str <a>>", "b", "string", "self.mode == '<a>'", "'b'"),
        ("L['self'].rows", [1], [1, 2], "other", "self.rows == [1]", "[1,2]"),
        (
            "L['self'].act", f"<function m.f{DIGEST}>", f"<function m.g{DIGEST}>",
            "object-id", "self.act == function m.f", "function m.g",
        ),
        (
            "L['self'].act", f"<function m.f{DIGEST}>", "<function m.f#fedcba9876543210>",
            "object-id", "self.act == function m.f", "another function m.f",
        ),
        (
            "type(L['self'].act)", f"<class m.A{DIGEST}{DIGEST}>", f"<class m.B{DIGEST}>",
            "type", "type(self.act) == class m.A", "class m.B",
        ),
        (
            "L['self'].kind", "<torch.float32>", "<torch.float16>",
            "other", "self.kind == torch.float32", "torch.float16",
        ),
        (
            "L['self'].long", f"sha256:{'a' * 64}", f"sha256:{'b' * 64}",
            "other", "self.long == a long value (sha256:aaaaaaaa...)",
            "a long value (sha256:bbbbbbbb...)",
        ),
        ("L['self'].k", 1, UNREADABLE, "other", "self.k == 1", "nothing that can be read"),
        ("L['self'].k", 1, REDACTED, "type", "self.k == 1", REDACTED),
    ],
)  # fmt: skip
def test_a_value_is_told_as_a_person_would_write_it(
    expression: str, before: JsonValue, after: JsonValue, klass: str, text: str, observed: str
) -> None:
    guard = value_guard(expression, before, after)
    assert (guard.klass, guard.text, guard.observed) == (klass, text, observed)
    assert guard.text.endswith(guard.expected)


def test_calls_that_broke_a_guard_are_counted_in_one_row() -> None:
    broken = [value_guard("L['self'].step", 0, now) for now in (1, 2, 3)]
    broken += [size_guard("x.size()[1] % 8 != 0", {"x.size()[1]": 16})]
    broken += [size_guard("x.size()[1] != 20", {"x.size()[1]": 20})]
    step, eight, twenty = tally(FRAME, broken)
    assert (step.count, step.expected, step.observed) == (3, "0", "1")
    assert step.pattern == "a counter that grows by one, from 0 to 3"
    assert [eight.guard, twenty.guard] == ["x.size()[1] % 8 != 0", "x.size()[1] != 20"]
    for row in (step, eight, twenty):
        assert (row.frame, row.dropped, row.cost_seconds) == (FRAME, True, None)
        assert not row.limit_hit


@pytest.mark.parametrize(
    ("expression", "before", "after", "fix"),
    [
        ("L['self'].step", 0, 1, "self.step = torch.tensor(self.step)  #"),
        (
            "L['self']._modules['mlp'].scale", 1.5, 2.5,
            "self.scale = torch.tensor(self.scale)  # once, where self.mlp.scale is first set;",
        ),
        (
            "M['pkg.mod'].COUNT", 0, 1,
            'self.register_buffer("COUNT", torch.tensor(pkg.mod.COUNT), persistent=False)  #',
        ),
        ("L['self'].step", 0, None, "hold self.step at 0 while"),
        ("L['self'].on", True, False, "hold self.on at True while"),
        ("L['self'].mode", "fast", "slow", "hold self.mode at 'fast' while"),
        ("len(L['self'].rows)", 2, 3, "hold len(self.rows) at 2 while"),
        ("L['self'].sizes[0]", 2, 3, "hold self.sizes[0] at 2 while"),
    ],
)  # fmt: skip
def test_numbers_become_tensors_and_all_else_is_held(
    expression: str, before: JsonValue, after: JsonValue, fix: str
) -> None:
    [row] = tally(FRAME, [value_guard(expression, before, after)])
    assert row.fix.startswith(fix)


def test_a_size_is_to_be_left_open() -> None:
    [row] = tally(FRAME, [size_guard("x.size()[1] % 8 != 0", {"x.size()[1]": 16})])
    assert row.fix.startswith("--dynamic-shapes unbacked  #")
    assert "the line below forward (model.py:12) that branches on it" in row.fix
