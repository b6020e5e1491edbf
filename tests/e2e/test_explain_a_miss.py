from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gen_miss_docs.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(script: dict[str, Any]) -> None:
    text = script["PAGE"].read_text(encoding="utf-8")
    assert len(script["BLOCK"].findall(text)) >= 5
    assert script["page"](text) == text, "run scripts/gen_miss_docs.py"
    assert max(len(line) for block in script["BLOCK"].findall(text) for line in block.split("\n")
               if not line.startswith("$")) <= script["COLUMNS"]  # fmt: skip


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ("key 9ab10d6fba75, 1.1 kB in 12 ms", True),
        ("key 5f038701a4ef, 1.1 kB  in 4.2 s", True),
        ("key 5f038701a4ef, 1.1 kB in 12 ms, codegen", False),
        ("7 artifacts in 12 ms", False),
    ],
)
def test_a_page_is_out_of_date_by_more_than_hashes_sizes_and_times(
    script: dict[str, Any], now: str, same: bool
) -> None:
    before = "key 5f038701a4ef, 1.2 kB in 3 ms"
    assert script["_same_or"](before, now) == (before if same else now)
