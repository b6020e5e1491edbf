"""CI's scripts and examples, run by bash in an empty directory with the eager backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SURROUNDINGS = ("VLLMC_", "TORCH", "GITHUB_", "CI_", "PREWARM_")


@dataclass(frozen=True)
class Done:
    """What a script did."""

    code: int
    out: str
    err: str


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


@pytest.fixture
def bash(workplace: Path) -> Callable[..., Done]:
    """Runs a script there, with what this Python's environment holds on its PATH."""

    def run(script: str, env: Mapping[str, str] | None = None) -> Done:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(SURROUNDINGS)}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            cwd=workplace,
            env=plain
            | {
                "PATH": f"{Path(sys.executable).parent}:{plain['PATH']}",
                "HF_HUB_OFFLINE": "1",
                "VLLMC_BACKEND": "eager",
                "VLLMC_CACHE_DIR": str(workplace / ".vllmc-cache"),
            }
            | dict(env or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(code=done.returncode, out=done.stdout, err=done.stderr)

    return run
