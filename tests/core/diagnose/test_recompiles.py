from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllmc.core.diagnose.recompiles import Recompile, explain, merge
from vllmc.core.torch_compat.recompiles import Recompilation, watch_recompiles

TOKEN = "hf_" + "aB3" * 8


def explained(reason: str, seconds: float | None = 0.5) -> Recompile:
    return explain(
        file="/somewhere/model.py", line=12, function="forward", reason=reason, seconds=seconds
    )


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
        ("0/0: ___check_obj_id(L['f'], 140001)", "other", "", "", ""),
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


def test_of_several_cache_entries_the_newest_says_what_changed() -> None:
    row = explained(
        "0/1: tensor 'x' size mismatch at index 0. expected 4, actual 7\n"
        "0/0: tensor 'x' dtype mismatch. expected Float, actual Double"
    )
    assert row.klass == "dtype"


def test_recompiles_of_one_guard_are_counted_and_their_costs_added() -> None:
    one = explained("0/0: k == 3", 0.5)
    other = explained("0/0: name == 'left'", None)
    rows = merge([one, other, one, other, one])
    assert [(row.guard, row.count, row.cost_seconds) for row in rows] == [
        ("k == 3", 3, 1.5),
        ("name == 'left'", 2, None),
    ]


def test_a_row_has_the_fields_of_the_contract() -> None:
    assert set(explained("0/0: k == 3").to_json()) == {
        "frame", "class", "guard", "subject", "expected", "observed", "count", "limit_hit",
        "cost_seconds", "fix",
    }  # fmt: skip


def recompilations(function: Callable[..., Any], *calls: tuple[Any, ...]) -> list[Recompilation]:
    """What running `function` again and again compiles anew, after the first call."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    compiled(*calls[0])
    with watch_recompiles() as found:
        for call in calls[1:]:
            compiled(*call)
    return found


def double(x: torch.Tensor, k: Any = 2) -> torch.Tensor:
    return x * 2 if k == "other" else x * 3


def test_a_recompile_is_seen_with_its_frame_reason_and_cost() -> None:
    (found,) = recompilations(double, (torch.ones(4),), (torch.ones(4, dtype=torch.float64),))
    assert found.file == __file__
    assert found.function == "double"
    assert found.seconds is not None
    assert found.seconds > 0
    row = explain(
        file=found.file,
        line=found.line,
        function=found.function,
        reason=found.reason,
        seconds=found.seconds,
    )
    assert (row.klass, row.expected, row.observed) == ("dtype", "Float", "Double")


@pytest.mark.parametrize(
    ("first", "second", "klass"),
    [
        ((torch.ones(4),), (torch.ones(7),), "shape"),
        ((torch.ones(1),), (torch.ones(7),), "shape-0-1"),
        ((torch.ones(4), "left"), (torch.ones(4), "other"), "string"),
    ],
)
def test_what_torch_says_today_is_classified(
    first: tuple[Any, ...], second: tuple[Any, ...], klass: str
) -> None:
    (found,) = recompilations(double, first, second)
    row = explain(file="f.py", line=1, function="f", reason=found.reason, seconds=None)
    assert row.klass == klass


def test_first_compilations_and_cache_hits_are_no_recompiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(double, backend="eager")
    with watch_recompiles() as found:
        compiled(torch.ones(4))
        compiled(torch.ones(4) * 2)
    assert found == []


def test_recompiles_are_seen_however_much_was_compiled_before() -> None:
    # Torch remembers its last 64 compilations.
    for _ in range(70):
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert len(recompilations(double, (torch.ones(4),), (torch.ones(7),))) == 1


def test_watching_leaves_torchs_memory_of_compilations_as_long_as_it_was() -> None:
    limit = torch._dynamo.utils._compilation_metrics.maxlen
    with watch_recompiles():
        pass
    assert torch._dynamo.utils._compilation_metrics.maxlen == limit


@pytest.mark.parametrize(
    ("reason", "guard", "expected"),
    [
        ("0/0: L['self'].api_key == 'hunter2'", "L['self'].api_key == <redacted>", "<redacted>"),
        (f"0/0: L['notes'] == '{TOKEN}'", "L['notes'] == '<redacted>'", "'<redacted>'"),
        ("0/0: L['self'].pad_token == '<pad>'", "L['self'].pad_token == '<pad>'", "'<pad>'"),
    ],
)
def test_a_guard_on_a_secret_does_not_tell_it(reason: str, guard: str, expected: str) -> None:
    row = explained(reason)
    assert (row.klass, row.guard, row.expected) == ("string", guard, expected)
