"""The README's section on CI, typed in an empty directory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vllmc.cli.matrix import read_matrix

ROOT = Path(__file__).parents[2]
Bash = Callable[..., Any]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_section_works_as_it_stands(bash: Bash, workplace: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [script] = re.findall(r"<!-- ci -->\n```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    done = bash(script)
    assert done.code == 0, done.err
    assert "2 in all: 2 compiled" in done.out or "2 in all: 1 compiled, 1 hit" in done.out
    assert done.out.rstrip().endswith("2 in all: 2 would-hit")
    assert "| three layers | **hit** |" in (workplace / "warm.md").read_text()
    assert len(list(ElementTree.parse(workplace / "warm.xml").iter("testcase"))) == 2


def test_the_matrix_file_of_the_docs_is_one(workplace: Path) -> None:
    [text] = blocks("docs/ci.md", "toml")
    (workplace / "warm.toml").write_text(text)
    first, second = read_matrix(workplace / "warm.toml")
    assert (first.name, second.name) == ("qwen3-0.6b", "chat, tuned")
    assert len(second.config.options) == 2


@pytest.mark.thorough
def test_the_ways_to_name_an_entry_of_a_provider_s_cache_work(bash: Bash, workplace: Path) -> None:
    [naming] = [block for block in blocks("docs/ci.md", "bash") if "sha256sum" in block]
    (workplace / "warm.toml").write_text('[[warm]]\nmodel = "tiny-llama"\n')
    done = bash(naming)
    assert done.code == 0, done.err
    key, digest = done.out.splitlines()
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert re.fullmatch(r"[0-9a-f]{64}  -", digest)
