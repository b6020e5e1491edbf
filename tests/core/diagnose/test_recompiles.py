from __future__ import annotations

import pytest

from vllmc.core.diagnose.recompiles import (
    Event,
    Recompile,
    frame_name,
    split_reasons,
    summarize,
)

TOKEN = "hf_" + "aB3" * 8


def event(reason: str, seconds: float | None = 0.5) -> Event:
    frame = frame_name("/somewhere/model.py", 12, "forward")
    return Event(frame=frame, reasons=split_reasons(reason), seconds=seconds)


def explained(reason: str, seconds: float | None = 0.5) -> Recompile:
    [row] = summarize([event(reason, seconds)])
    return row


@pytest.mark.parametrize(
    ("reason", "klass", "subject", "expected", "observed"),
    [
        (
            "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 7",
            "shape", "x.size()[0]", "4", "7",
        ),
        (
            "0/0: tensor 'x' size mismatch at index 1. expected 1, actual 7",
            "shape-0-1", "x.size()[1]", "1", "7",
        ),
        (
            "0/0: tensor 'x' dtype mismatch. expected Float, actual Double",
            "dtype", "x", "Float", "Double",
        ),
        (
            "0/1: 2 <= x.size()[0]  # y = x + 1  # model.py:3 in forward",
            "shape-0-1", "x.size()[0]", ">= 2", "0 or 1",
        ),
        ("0/0: k == 3  # return x * k  # model.py:3 in forward", "int", "k", "3", ""),
        ("0/0: name == 'left'", "string", "name", "'left'", ""),
        ("0/0: k == 2.5", "other", "k", "2.5", ""),
        (
            "0/0: tensor 'L['x']' size mismatch at index 0",
            "shape", "x.size()[0]", "", "",
        ),
        ("- L['k'] == 3", "int", "k", "3", ""),
        ("0/0: L['x'].size()[0] == 4", "shape", "x.size()[0]", "4", ""),
        (
            "0/0: tensor 'x' stride mismatch at index 0. expected 8, actual 1",
            "layout", "x.stride()[0]", "8", "1",
        ),
        (
            "0/0: ___check_obj_id(L['f'], 140001), type=<class 'function'>  # return f(x)",
            "object-id", "f", "the same function", "",
        ),
        (
            "0/1: (x.size()[0] % 8) == 0  # if x.shape[0] % 8 == 0:",
            "shape", "x.size()[0]", "(x.size()[0] % 8) == 0", "",
        ),
        ("0/1: x.size()[1] != 1", "shape-0-1", "x.size()[1]", "x.size()[1] != 1", ""),
        ("0/0: BACKEND_MATCH failure: X (id=0x7f9a88cab290)", "object-id", "backend",
            "the same object", ""),
        ("0/0: Cache line invalidated because L['w'] got deallocated", "object-id", "w",
            "the same object", ""),
        ("0/0: GLOBAL_STATE changed: grad_mode ", "global-state", "grad_mode", "", ""),
        (
            "0/1: ___check_type_id(k, 140302), type=<class 'float'>  # return x * k",
            "type", "k", "float", "",
        ),
        (
            "0/2: expected type of 'k' to be a tensor type, ' but found <class 'str'>",
            "type", "k", "tensor type", "str",
        ),
        (
            "0/0: x.size()[0]*x.size()[1] <= 2147483647  # (_inductor/codegen/simd.py)",
            "index-width", "x.size()[0]", "x.size()[0]*x.size()[1] <= 2147483647", "",
        ),
        ("0/0: tensor 'x' requires_grad mismatch. expected requires_grad=0",
            "other", "x.requires_grad", "0", ""),
        ("what no torch ever wrote", "other", "", "", ""),
    ],
)  # fmt: skip
def test_a_reason_is_taken_apart(
    reason: str, klass: str, subject: str, expected: str, observed: str
) -> None:
    row = explained(reason)
    assert (row.klass, row.subject, row.expected, row.observed) == (
        klass,
        subject,
        expected,
        observed,
    )
    assert row.frame == "model.py:12 in forward"
    assert row.fix
    assert "#" not in row.guard


@pytest.mark.parametrize(
    ("reasons", "klass", "observed"),
    [
        # The second entry has the right dtype already.
        (
            "0/1: tensor 'x' dtype mismatch. expected Float, actual Double\n"
            "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 7",
            "shape", "7",
        ),
        # An entry for any size is nearer than one for a single size, which tells what came.
        (
            "0/2: tensor 'x' size mismatch at index 0. expected 1, actual 0\n"
            "0/1: 2 <= x.size()[0]  # return x.sum(0)\n"
            "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 0",
            "shape-0-1", "0",
        ),
        (
            "0/1: 2 <= x.size()[0] <= 16  # if x.shape[0] <= 16:\n"
            "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 32",
            "shape", "32",
        ),
        (
            "0/1: 2 <= x.size()[0] <= 16  # if x.shape[0] <= 16:\n"
            "0/0: tensor 'x' size mismatch at index 0. expected 4, actual 1",
            "shape-0-1", "1",
        ),
        ("0/0: k == 1\n0/10: k == 3\n0/9: k == 2", "int", ""),
    ],
)  # fmt: skip
def test_of_several_entries_that_nearest_to_being_used_decides(
    reasons: str, klass: str, observed: str
) -> None:
    row = explained(reasons)
    assert (row.klass, row.observed) == (klass, observed)
    if klass == "int":
        assert row.guard == "k == 3", "the latest of equals"


def test_recompiles_of_one_subject_are_counted_and_their_costs_added() -> None:
    one, other = event("0/0: k == 3", 0.5), event("0/0: name == 'left'", None)
    rows = summarize([one, other, one, other, one])
    assert [(row.guard, row.count, row.cost_seconds) for row in rows] == [
        ("k == 3", 3, 1.5),
        ("name == 'left'", 2, None),
    ]


def test_what_came_is_what_the_next_compilation_expects() -> None:
    [row] = summarize([event("0/0: k == 3"), event("0/1: k == 5\n0/0: k == 3")])
    assert (row.expected, row.observed) == ("3", "5")
    [row] = summarize([event("0/0: k == 3"), event("0/4: k == 5\n0/0: k == 3")])
    assert row.observed == ""
    gone = "Cache line invalidated because L['w'] got deallocated"
    [row] = summarize([event(f"0/0: {gone}"), event(f"0/1: {gone}")])
    assert (row.expected, row.observed) == ("the same object", "")


@pytest.mark.parametrize(
    ("reason", "frame", "declared"),
    [
        ("tensor 'x' size mismatch at index 1. expected 1, actual 7", "forward",
            '{"x": {1: "x_1"}}'),
        ("tensor 'x' size mismatch at index 0. expected 4, actual 7", "forward",
            '{"x": {0: "x_0"}}'),
        ("2 <= L['ids'].size()[0]", "forward", '{"ids": {0: "ids_0"}}'),
        ("tensor 'x' size mismatch at index 0. expected 4, actual 7", "f", None),
        ("tensor 'x' size mismatch at index 0. expected 1, actual 7",
            "torch_dynamo_resume_in_forward_at_12", None),
        ("tensor 'self.w' size mismatch at index 0. expected 4, actual 7", "forward", None),
        ("tensor 'x[0]' size mismatch at index 0. expected 4, actual 7", "forward", None),
        ("tensor 'x' stride mismatch at index 0. expected 4, actual 7", "forward", None),
    ],
)  # fmt: skip
def test_a_size_of_an_argument_of_a_module_can_be_declared(
    reason: str, frame: str, declared: str | None
) -> None:
    [row] = summarize([Event(frame=f"model.py:12 in {frame}", reasons=(f"0/0: {reason}",))])
    code, _, remark = row.fix.partition("  # ")
    assert code.startswith(("torch._dynamo.", "x = x.contiguous()"))
    expected = (
        f"; or once, on its class: @vllmc.core.support_torch_compile(dynamic_arg_dims={declared})"
    )
    assert remark.endswith(expected) == bool(declared)
    assert ("support_torch_compile" in remark) == bool(declared)


@pytest.mark.parametrize(
    ("reasons", "pattern"),
    [
        ([f"0/{n}: self.step == {n}" for n in range(5)],
            "a counter that grows by one, from 0 to 4"),
        ([f"0/{n}: name == 'model.layers.{n}.attn'" for n in range(4)], "one per layer"),
        ([f"0/{n}: name == 'model.{n}x'" for n in range(4)], ""),
        (
            [
                f"0/{n}: tensor 'x' size mismatch at index 0. expected {2**n}, actual {2 * 2**n}"
                for n in range(2, 6)
            ],
            "one per size",
        ),
        (
            ["0/0: tensor 'x' dtype mismatch. expected Float, actual Half",
             "0/1: tensor 'x' dtype mismatch. expected Half, actual Float"],
            "alternates between Float and Half",
        ),
        (["0/0: k == 1", "0/1: k == 2"], ""),
        (["0/0: k == 1", "0/1: k == 7", "0/2: k == 3"], ""),
    ],
)  # fmt: skip
def test_values_over_time_show_a_pattern(reasons: list[str], pattern: str) -> None:
    [row] = summarize(event(reason) for reason in reasons)
    assert row.pattern == pattern
    assert row.count == len(reasons)


def test_a_frame_that_hit_the_limit_did_so_with_all_its_rows() -> None:
    warning = Event(frame="m.py:1 in f", reasons=("0/7: k == 9",), limit_hit=True, warned=True)
    known = Event(frame="m.py:1 in f", reasons=("0/0: name == 'a'",))
    other = Event(frame="m.py:9 in g", reasons=("1/0: k == 1",))
    rows = summarize([known, other, warning])
    assert [(row.guard, row.count, row.limit_hit) for row in rows] == [
        ("name == 'a'", 1, True),
        ("k == 1", 1, False),
    ]
    [alone] = summarize([warning, warning])
    assert (alone.guard, alone.count, alone.limit_hit) == ("k == 9", 1, True)


def test_a_row_has_the_fields_of_the_contract() -> None:
    assert set(explained("0/0: k == 3").to_json()) == {
        "frame", "class", "guard", "subject", "expected", "observed", "count", "limit_hit",
        "cost_seconds", "fix", "pattern", "dropped",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "guard", "expected"),
    [
        ("0/0: L['self'].api_key == 'hunter2'", "L['self'].api_key == <redacted>", "<redacted>"),
        (f"0/0: L['notes'] == '{TOKEN}'", "L['notes'] == '<redacted>'", "'<redacted>'"),
        ("0/0: L['token'] == 3", "L['token'] == 3", "3"),
        (
            "0/0: tensor 'token' dtype mismatch. expected Float, actual Double",
            "tensor 'token' dtype mismatch. expected Float, actual Double",
            "Float",
        ),
        ("0/0: L['self'].pad_token == '<pad>'", "L['self'].pad_token == '<pad>'", "'<pad>'"),
    ],
)
def test_a_guard_on_a_secret_does_not_tell_it(reason: str, guard: str, expected: str) -> None:
    row = explained(reason)
    assert (row.guard, row.expected) == (guard, expected)
    assert "hunter2" not in str(row)
    assert TOKEN not in str(row)
