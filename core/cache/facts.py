"""Slow answers, remembered below the cache directory in `facts/`. Imports no torch.

A fact is named by the digest of what it follows from, so it never becomes wrong, and begins with
the SHA-256 of its name and itself. It is never worth an error: one that is damaged, lies under
another name or cannot be read is found again, and where none can be written, so is it every time.
One that another user may have written is not believed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vllmc.core.cache.files import IrregularFile, make_directory, read_with_status
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.trust import Trust
from vllmc.core.errors import VllmcError

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


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
    _, _, fact = text.partition("\n")
    return fact if text == _sealed(name, fact) else None


def remember(cache: Path | None, name: str, fact: str) -> None:
    """Writes a fact, in place of any of its name."""
    if cache is None:
        return
    file = _file(cache, name)
    with contextlib.suppress(OSError):
        make_directory(file.parent)
        draft = file.with_name(f".{os.getpid()}.{secrets.token_hex(8)}")
        try:
            # Written to what was made here, not to what another may have put in its place.
            with os.fdopen(os.open(draft, _NEW, 0o644), "w", encoding="utf-8") as opened:
                opened.write(_sealed(name, fact))
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


def _sealed(name: str, fact: str) -> str:
    return f"{sha256_hex(f'{name} {fact}')}\n{fact}"


def _file(cache: Path, name: str) -> Path:
    return cache / "facts" / name
