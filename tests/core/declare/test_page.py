"""docs/declare.md: its program is run, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_page_shows_a_program_and_what_it_prints(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "declare.md").read_text(encoding="utf-8")
    model, program, printed, *_ = re.findall(r"(?s)```(?:python)?\n(.*?)```", page)
    (tmp_path / "stack.py").write_text(model)
    (tmp_path / "program.py").write_text(program)
    # When a process began is known to a hundredth of a second: what changed by then may have
    # changed later, and is looked at again.
    time.sleep(0.1)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "program.py"],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("VLLMC_")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == printed
    programs = list((tmp_path / "cache").rglob("programs/*/*/*.json"))
    assert len(programs) == 1
