"""Large models: what they take is known only by doing it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def vllmc(*words: str, cache: Path) -> dict[str, Any]:
    program = "from vllmc.cli.app import entry_point; entry_point()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--json", "--cache-dir", str(cache)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
def test_seventy_billion_parameters_are_warmed_without_weights_and_found_again(
    tmp_path: Path,
) -> None:
    held = b"x" * (1500 << 20)
    first = vllmc("warm", "llama-3-70b", "--backend", "eager", cache=tmp_path)
    # What the process holds that starts it is not its own.
    del held
    assert first["pieces"] == {"total": 161, "splitting": 80, "compilable": 81, "unique": 3}
    assert first["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    assert first["peak_rss_mb"] < 1500
    second = vllmc("warm", "llama-3-70b", "--backend", "eager", cache=tmp_path)
    assert (second["outcome"], second["program"]) == ("hit", "hit")
    assert second["seconds"]["capture"] == 0
