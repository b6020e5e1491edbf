from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.summary import summary, write_summary
from vllmc.core.errors import VllmcError


def unit(outcome: str, *pieces: str, bytes: int, seconds: float = 0.0) -> dict[str, Any]:
    return {
        "pieces": list(pieces),
        "range": "1:8",
        "outcome": outcome,
        "artifact": f"{bytes:064x}",
        "bytes": bytes,
        "seconds": seconds,
    }


def row(outcome: str = "compiled", **fields: Any) -> dict[str, Any]:
    return {
        "name": "tiny-llama",
        "model": "tiny-llama",
        "outcome": outcome,
        "pieces": {"total": 5, "splitting": 2, "compilable": 3, "unique": 3},
        "counts": {"hit": 2, "dup": 0, "compiled": 1},
        "units": [
            unit("hit", "piece_0", bytes=1_500),
            unit("compiled", *(f"piece_{n}" for n in range(2, 14, 2)), bytes=95_500, seconds=1.25),
        ],
        "seconds": {"total": 4.0, "capture": 1.0, "compile": 2.5, "store": 0.1},
        "saved_seconds": 0.75,
        "miss": None,
        "layer_names": None,
    } | fields


def change(name: str, before: object, after: object, **fields: Any) -> dict[str, Any]:
    return {
        "group": "inductor",
        "name": name,
        "before": before,
        "after": after,
        "origin_before": "default",
        "origin_after": "flag",
    } | fields


def test_each_model_is_a_row_and_what_was_compiled_a_table() -> None:
    other = row("hit", name="other", units=[unit("hit", "piece_0", bytes=1_500)])
    assert summary([row(), other]).splitlines() == [
        "### vllmc warm",
        "",
        "| model | outcome | hit | dup | compiled | unique pieces | size | time | saved |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        "| tiny-llama | **compiled** | 2 | 0 | 1 | 3 | 97.0 kB | 4.0 s | 750 ms |",
        "| other | **hit** | 2 | 0 | 1 | 3 | 1.5 kB | 4.0 s | 750 ms |",
        "| **all** |  | 4 | 0 | 2 | 6 | 97.0 kB | 8.0 s | 1.5 s |",
        "",
        "#### tiny-llama: compiled",
        "",
        "| pieces | range | size | time |",
        "|---|---|---:|---:|",
        "| piece_2, piece_4, piece_6, piece_8 and 2 more | 1:8 | 95.5 kB | 1.2 s |",
    ]


def test_a_miss_lists_what_differs_and_no_value_breaks_the_table() -> None:
    changes = [
        change("mode", "a|b", "c"),
        change("gone", True, None, origin_after=None, origin_before="env:GONE"),
    ]
    text = summary([row(units=[], miss={"nearest_key": "00", "changes": changes})])
    assert text.splitlines()[-5:] == [
        "",
        "| factor | before | after | origin |",
        "|---|---|---|---|",
        "| inductor.mode | a\\|b | c | flag |",
        "| inductor.gone | true | null | env:GONE |",
    ]


def test_markdown_shows_every_text_as_it_is() -> None:
    changes = [change("TOKEN", "<redacted>", "*a*\n`b`")]
    miss = {"nearest_key": "00", "changes": changes}
    failed = row(name="<b>_x_</b>", units=[], miss=miss, reason="no <class 'a_b.C'> & no more")
    lines = summary([failed]).splitlines()
    assert lines[4].startswith(r"| \<b\>\_x\_\</b\> | **compiled** |")
    assert r"\<b\>\_x\_\</b\>: no \<class 'a_b.C'\> \& no more" in lines
    assert lines[-1] == r"| inductor.TOKEN | \<redacted\> | \*a\* \`b\` | flag |"


def test_what_layer_names_cost_is_told_with_a_fix_to_copy() -> None:
    op = {
        "op": "myops::kv_update",
        "argument": "name",
        "values": 2,
        "examples": ["a", "b"],
        "pieces": ["piece_2", "piece_4"],
        "fix": "first line\nsecond line",
    }
    cost = {"compiled": 1, "seconds": 0.5, "bytes": 95_500}
    found = {"unique": 4, "would_be": 3, "ops": [op], **cost}
    assert summary([row(units=[], layer_names=found)]).splitlines()[5:] == [
        "",
        "tiny-llama: layer-name strings made 4 pieces unique that would otherwise be 3: "
        "1 more unit compiled in 500 ms, 95.5 kB stored",
        "",
        "- myops::kv_update, argument name: 2 strings, 'a' to 'b'",
        "",
        "```",
        "first line",
        "second line",
        "```",
    ]


def test_many_differences_are_cut_short() -> None:
    changes = [change(f"option_{n}", 1, 2) for n in range(33)]
    text = summary([row(miss={"nearest_key": "00", "changes": changes})])
    assert text.endswith("\n\nand 3 more\n")
    assert "option_29" in text
    assert "option_30" not in text


def test_a_prediction_has_a_reason_and_no_time() -> None:
    predicted = row(
        "would-miss",
        pieces=None,
        units=[],
        counts={"hit": 0, "dup": 0, "compiled": 0},
        seconds={"total": 0.0, "capture": 0.0, "compile": 0.0, "store": 0.0},
        saved_seconds=0.0,
        reason="the cache holds no program yet",
    )
    text = summary([predicted]).splitlines()
    assert text[4] == "| tiny-llama | **would-miss** | 0 | 0 | 0 |  |  |  |  |"
    assert text[-1] == "tiny-llama: the cache holds no program yet"


def test_a_failure_has_its_reason_and_what_to_do() -> None:
    failed = row("failed", units=[], reason="it broke", error={"hint": "mend it"})
    assert summary([failed]).endswith("\n\ntiny-llama: it broke (hint: mend it)\n")


def test_the_page_is_appended_to(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n")
    write_summary(page, [row()])
    assert page.read_text() == "before\n" + summary([row()])


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VllmcError) as caught:
        write_summary(tmp_path, [row()])
    assert caught.value.code == "not-writable"
    assert "--summary" in caught.value.hint
