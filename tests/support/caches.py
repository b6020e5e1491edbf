"""What lies in a cache directory."""

from __future__ import annotations

from pathlib import Path


def stored(cache: Path) -> list[Path]:
    """Its files, but for what is remembered of the machine and of models, which is no program's."""
    found = (path for path in (cache / "v1").rglob("*") if path.is_file())
    return sorted(path for path in found if path.parent.name != "facts")
