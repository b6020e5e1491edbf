"""What a compiler says of itself. Imports no torch."""

from __future__ import annotations

import subprocess
from typing import Final

_VERSION_TIMEOUT_SECONDS: Final = 10


def compiler_version(program: str) -> str:
    """The first line of what a compiler says of itself; `unknown version` where it says none."""
    try:
        asked = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown version"
    lines = asked.stdout.splitlines()
    return lines[0].strip()[:200] or "unknown version" if lines else "unknown version"
