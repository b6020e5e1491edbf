"""Slow answers, remembered below the cache directory in `facts/`. Imports no torch.

A fact is named by the digest of what it follows from, so it never becomes wrong, and begins with
its own SHA-256. It is never worth an error: one that is damaged or cannot be read is found again,
and where none can be written, so is it every time. One that another user may have
written is not believed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from vllmc.core.cache.files import IrregularFile, make_directory, read_with_status
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.trust import Trust
from vllmc.core.errors import VllmcError


def recall(cache: Path | None, name: str) -> str | None:
    """The fact of this name; None where there is none that is whole, or no `cache`."""
    if cache is None:
        return None
    try:
        data, status = read_with_status(_file(cache, name))
        text = data.decode("utf-8")
    except (FileNotFoundError, IrregularFile, VllmcError, UnicodeDecodeError):
        return None
    if Trust().doubt(status) is not None:
        return None
    digest, _, fact = text.partition("\n")
    return fact if digest == sha256_hex(fact) else None


def remember(cache: Path | None, name: str, fact: str) -> None:
    """Writes a fact, in place of any of its name."""
    if cache is None:
        return
    file = _file(cache, name)
    with contextlib.suppress(OSError):
        make_directory(file.parent)
        draft = file.with_name(f".{os.getpid()}.{secrets.token_hex(8)}")
        try:
            draft.touch(mode=0o644, exist_ok=False)
            draft.write_text(f"{sha256_hex(fact)}\n{fact}", encoding="utf-8")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def remembered(cache: Path | None, name: str, compute: Callable[[], str]) -> str:
    """The fact of this name, or what `compute` finds, which is then remembered."""
    if (known := recall(cache, name)) is not None:
        return known
    fact = compute()
    remember(cache, name, fact)
    return fact


def _file(cache: Path, name: str) -> Path:
    return cache / "facts" / name
