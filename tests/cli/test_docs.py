from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gen_cli_docs.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_page_of_the_command_line_is_up_to_date(script: dict[str, Any]) -> None:
    page: Path = script["PAGE"]
    assert page.read_text(encoding="utf-8") == script["page"](), "run scripts/gen_cli_docs.py"


def test_the_page_names_every_command_and_its_options(script: dict[str, Any]) -> None:
    make: Callable[[], str] = script["page"]
    text = make()
    for name in ("models", "cache ls", "cache show", "cache stats", "cache verify", "cache path"):
        assert f"\n## vllmc {name}\n" in text
    assert "- `--repair`: " in text
    assert "- `--cache-dir DIR`: " in text
    assert "`VLLMC_COMPILE_RANGE`" in text
