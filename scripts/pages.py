"""What the scripts that write a page of docs/ have in common."""

from __future__ import annotations

import sys
from pathlib import Path


def publish(page: Path, text: str, script: str) -> int:
    """Writes `text` to `page`; with `--check` says whether it stands there. An exit code."""
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        return 0
    current = page.is_file() and page.read_text(encoding="utf-8") == text
    if not current:
        print(f"{page.name} is out of date: run python {script}")
    return 0 if current else 1
