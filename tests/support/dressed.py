"""The installed torch, but for the file that says which version it is."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def dress_torch(directory: Path, version: str) -> Path:
    """Makes `directory` one to put first on PYTHONPATH: `import torch` then finds it there."""
    real = Path(torch.__file__).parent
    dressed = directory / "torch"
    dressed.mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name not in ("version.py", "__pycache__"):
            (dressed / entry.name).symlink_to(entry)
    text = (real / "version.py").read_text(encoding="utf-8")
    changed = re.sub(r"^__version__ = .*$", f"__version__ = {version!r}", text, flags=re.M)
    assert changed != text
    (dressed / "version.py").write_text(changed, encoding="utf-8")
    return directory
