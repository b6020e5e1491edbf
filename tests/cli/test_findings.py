from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.findings import find, github, write_code_quality
from vllmc.cli.options import CompileFlags, compile_request
from vllmc.cli.prewarm import Place, Result, Task
from vllmc.cli.settings import load_settings
from vllmc.core.errors import VllmcError

KEYS = {name: f"{index:064x}" for index, name in enumerate(("own", "stored", "sibling"))}


def change(before: object = False, after: object = True) -> dict[str, Any]:
    return {"group": "inductor", "name": "max_autotune", "before": before, "after": after}


def missed(key: str = KEYS["stored"], **fields: Any) -> dict[str, Any]:
    return {"nearest_key": key, "nearest_model": None, "changes": [change()]} | fields


@pytest.fixture
def result(tmp_path: Path) -> Any:
    settings = load_settings(environment={}, directory=tmp_path)
    request = compile_request(settings, CompileFlags(), "tiny-llama")

    def make(
        outcome: str,
        *,
        name: str = "tuned",
        line: int = 4,
        error: VllmcError | None = None,
        **fields: Any,
    ) -> Result:
        place = Place(file=tmp_path / "ci" / "warm.toml", line=line)
        row = {
            "key": KEYS["own"],
            "outcome": outcome,
            "counts": {"hit": 0, "dup": 0, "compiled": 3 if outcome == "compiled" else 0},
            "miss": None,
        }
        task = Task(name=name, request=request, settings=settings, place=place)
        return Result(task=task, row=row | fields, error=error)

    return make


def told(results: list[Result]) -> list[tuple[str, str, str]]:
    return [(found.level, found.title, found.message) for found in find(results)]


def test_what_is_done_and_nothing_moved_is_no_finding(result: Any) -> None:
    first = missed(None, changes=[])
    assert told([result("hit"), result("compiled", miss=first), result("would-hit")]) == []


def test_what_does_not_hold_is_an_error_with_the_fields_that_moved(result: Any) -> None:
    would = result("would-miss", reason="it differs", miss=missed())
    unsafe = result("unsafe", reason="a corrupt artifact", name="other")
    assert told([would, unsafe]) == [
        (
            "error",
            "tuned would have to compile",
            "it differs (inductor.max_autotune: false -> true)",
        ),
        ("error", "other meets something in the cache that must not be used", "a corrupt artifact"),
    ]


def test_a_failure_is_an_error_with_its_hint(result: Any) -> None:
    error = VllmcError("broken", "it broke", hint="mend it")
    failed = result("failed", error=error, reason="it broke")
    failed.row["error"] = {"code": "broken", "hint": "mend it"}
    assert told([failed]) == [("error", "tuned could not be compiled", "it broke (hint: mend it)")]


def test_what_was_compiled_at_a_later_attempt_is_a_warning(result: Any) -> None:
    again = result("compiled", error=VllmcError("broken", "it broke"))
    assert told([again]) == [("warning", "tuned was compiled at a later attempt", "it broke")]


def test_what_was_stored_before_and_missed_is_a_warning(result: Any) -> None:
    assert told([result("compiled", miss=missed())]) == [
        ("warning", "tuned was compiled anew", "inductor.max_autotune: false -> true")
    ]


def test_a_difference_from_another_entry_or_another_model_is_none(result: Any) -> None:
    sibling = result("hit", key=KEYS["sibling"])
    assert told([sibling, result("compiled", miss=missed(KEYS["sibling"]))]) == []
    assert told([result("compiled", miss=missed(nearest_model="other"))]) == []


def test_workflow_commands_escape_what_github_would_read_otherwise(
    result: Any, tmp_path: Path
) -> None:
    found = find([result("would-miss", name="a,b: 100%", reason="first\r\nsecond: 1, 2 ::x 5%0A")])
    assert github(found, tmp_path) == (
        "::error file=ci/warm.toml,line=4,title=a%2Cb%3A 100%25 would have to compile::"
        "first%0D%0Asecond: 1, 2 ::x 5%250A",
    )


def test_a_file_outside_of_the_checkout_keeps_its_whole_path(result: Any, tmp_path: Path) -> None:
    [line] = github(find([result("unknown", reason="why")]), tmp_path / "elsewhere")
    assert line.startswith(f"::error file={tmp_path}/ci/warm.toml,line=4,")


def test_the_code_quality_report_has_gitlab_s_fields(result: Any, tmp_path: Path) -> None:
    page = tmp_path / "reports" / "quality.json"
    rows = [result("would-miss", reason="why"), result("compiled", name="other", miss=missed())]
    write_code_quality(page, find(rows), tmp_path)
    first, second = json.loads(page.read_text())
    fingerprints = {first.pop("fingerprint"), second.pop("fingerprint")}
    assert len(fingerprints) == 2
    assert all(len(text) == 64 for text in fingerprints)
    assert first == {
        "description": "tuned would have to compile: why",
        "check_name": "vllmc-would-miss",
        "severity": "major",
        "location": {"path": "ci/warm.toml", "lines": {"begin": 4}},
    }
    assert (second["check_name"], second["severity"]) == ("vllmc-missed", "minor")


def test_a_finding_is_the_same_one_wherever_its_entry_moves_to(result: Any, tmp_path: Path) -> None:
    page = tmp_path / "quality.json"
    seen = set()
    for line in (4, 40):
        write_code_quality(page, find([result("unknown", reason="why", line=line)]), tmp_path)
        seen.add(json.loads(page.read_text())[0]["fingerprint"])
    assert len(seen) == 1


def test_a_clean_report_is_an_empty_list(result: Any, tmp_path: Path) -> None:
    page = tmp_path / "quality.json"
    write_code_quality(page, find([result("hit")]), tmp_path)
    assert json.loads(page.read_text()) == []
