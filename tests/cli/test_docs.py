from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllmc.cli.app import build_app
from vllmc.core.cache.factor_table import CUDA_ENVIRONMENT, ENVIRONMENT
from vllmc.core.cache.factors import excluded

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / "gen_cli_docs.py"))


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


def test_no_help_is_taken_for_markup(script: dict[str, Any]) -> None:
    # Rich reads `[word]` as a style where it draws a help page, and shows nothing of it.
    for path, command, _ in script["_commands"](build_app(), "vllmc"):
        texts = [command.help, *(getattr(param, "help", None) or "" for param in command.params)]
        assert not [text for text in texts if re.search(r"\[[a-z]", text)], path


@pytest.fixture
def of_keys() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPTS / "gen_cache_key_doc.py"))


def test_the_page_of_the_cache_key_is_up_to_date(of_keys: dict[str, Any]) -> None:
    page: Path = of_keys["PAGE"]
    assert page.read_text(encoding="utf-8") == of_keys["page"](), "run scripts/gen_cache_key_doc.py"


def test_the_page_shows_every_exclusion_with_its_reason(of_keys: dict[str, Any]) -> None:
    lines = of_keys["page"]().splitlines()
    for name, reason in excluded():
        assert [line for line in lines if f"`{name}`" in line and line.endswith(f"| {reason} |")]
    for variable in (*ENVIRONMENT, *CUDA_ENVIRONMENT):
        assert [line for line in lines if line.startswith(f"| `{variable}` | ")]


def test_the_page_is_the_same_on_every_machine(of_keys: dict[str, Any]) -> None:
    text = of_keys["page"]()
    for local in (torch.__version__, sys.prefix, str(Path.cwd()), str(Path.home())):
        assert local not in text
