from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from vllmc.cli.prove import report


def lines(row: dict[str, Any], width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(report(row))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def verdict(code: str = "same", **fields: Any) -> dict[str, Any]:
    return {
        "code": code,
        "units": 0,
        "of": 3,
        "differing": [],
        "bitwise": True,
        "max_abs_diff": 0.0,
        "reason": "",
    } | fields


def change(name: str = "max_autotune", code: str = "same", **fields: Any) -> dict[str, Any]:
    named = {"group": "inductor", "name": name, "before": False, "after": True}
    return named | verdict(code, **fields)


def unproved(name: str, reason: str) -> dict[str, Any]:
    return change(
        name, "unproved", group="versions", of=0, bitwise=None, max_abs_diff=None, reason=reason
    )


def proof(*changes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    proved = [c for c in changes if c["code"] != "unproved"]
    return {
        "model": "tiny-llama",
        "pieces": 3,
        "changes": list(changes),
        "together": (proved[-1] if proved else verdict("unproved", reason="none")) | {"changes": 1},
        "elsewhere": [],
    } | fields


def test_one_change_that_changes_no_code_is_said_in_the_first_line() -> None:
    assert lines(proof(change())) == [
        "tiny-llama: inductor.max_autotune changed: no piece's code differs",
        "",
        "OPTION                 BEFORE  AFTER  CODE  RESULTS",
        "inductor.max_autotune  false   true   same  equal",
    ]


def test_several_changes_are_judged_together_and_shown_alone() -> None:
    unsafe = change("cpp.unsafe", "differs", units=2, bitwise=False, max_abs_diff=9.53674e-07)
    text = lines(proof(change(), change("size_asserts", "differs", units=3), unsafe))
    assert text == [
        "tiny-llama: all 3 changes together: the code of 2 of 3 units differs, and the",
        "results on random inputs differ by at most 9.5e-07",
        "",
        "OPTION                 BEFORE  AFTER  CODE           RESULTS",
        "inductor.max_autotune  false   true   same           equal",
        "inductor.size_asserts  false   true   3 of 3 differ  equal",
        "inductor.cpp.unsafe    false   true   2 of 3 differ  max diff 9.5e-07",
        "all together                          2 of 3 differ  max diff 9.5e-07",
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            verdict("differs", units=1),
            "the code of 1 of 3 units differs, the results on random inputs are equal bit for bit",
        ),
        (
            verdict("same", reason="only one side serves 9:16 tokens"),
            "no piece's code differs (only one side serves 9:16 tokens)",
        ),
        (
            verdict("same", bitwise=False, max_abs_diff=0.5),
            "no piece's code differs, and the results on random inputs differ by at most 0.5",
        ),
        (
            verdict("differs", units=1, bitwise=None, max_abs_diff=None, reason="cut elsewhere"),
            "the code of 1 of 3 units differs, the results were not compared (cut elsewhere)",
        ),
        (
            verdict("differs", units=1, bitwise=False, max_abs_diff=None),
            "the code of 1 of 3 units differs, the results on random inputs differ",
        ),
    ],
)
def test_each_finding_is_a_sentence(found: dict[str, Any], words: str) -> None:
    [first, *_] = lines(proof(change() | found), width=160)
    assert first == f"tiny-llama: inductor.max_autotune changed: {words}"


def test_what_cannot_be_proved_is_counted_in_the_verdict_and_listed_by_its_reason() -> None:
    missing = [unproved(name, "another version") for name in ("python", "torch", "torch_key")]
    text = lines(proof(*missing, unproved("march", "another CPU"), change()))
    assert " ".join(text[:2]).endswith("no piece's code differs; 4 more cannot be proved here")
    start = next(index for index, line in enumerate(text) if line.startswith("CANNOT BE PROVED"))
    assert [re.split(r"  +", line) for line in text[start:]] == [
        ["CANNOT BE PROVED HERE", "WHY"],
        ["versions.python, versions.torch, versions.torch_key", "another version"],
        ["versions.march", "another CPU"],
    ]


def test_nothing_is_claimed_where_nothing_was_proved() -> None:
    assert lines(proof())[0] == "nothing to prove: no difference affects the key"
    text = lines(proof(unproved("torch", "another version")))
    assert text[0] == "tiny-llama: nothing can be proved here"
    assert "OPTION" not in "\n".join(text)


def test_changes_that_do_not_hold_together_are_not_judged_together() -> None:
    together = verdict("unproved", of=0, bitwise=None, max_abs_diff=None, reason="it fails")
    text = lines(proof(change(), change("b"), together=together))
    assert text[0] == "tiny-llama: both changes together cannot be proved: it fails"
    assert text[-1].split() == ["all", "together", "cannot", "be", "proved", "it", "fails"]


def test_what_follows_from_a_change_stands_beside_it() -> None:
    follower = change("cpu_features", "together", group="system", reason="it follows")
    text = lines(proof(follower, change("cpp.march")))
    assert text[3].split() == ["system.cpu_features", "false", "true", "with", "the", "others"]


def test_what_is_not_as_on_the_sides_is_said() -> None:
    text = lines(proof(change(), elsewhere=["versions.torch", "system.cpu_features"]))
    assert text[-2:] == [
        "here these have another value than on both sides: versions.torch,",
        "system.cpu_features",
    ]


def test_a_long_option_and_long_values_fit_eighty_columns() -> None:
    long = change("cpp.enable_unsafe_math_opt_flag_" * 2, before="a" * 60, after=[1] * 60)
    assert max(map(len, lines(proof(long, change())))) <= 80
