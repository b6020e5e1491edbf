"""Slow answers, remembered below the cache directory in `v1/facts`. Imports no torch.

A fact is named by the digest of what it follows from, so it never becomes wrong, and begins with
the SHA-256 of its name and itself. It is never worth an error: one that is damaged, lies under
another name or cannot be read is found again, and where none can be written, so is it every time.
One that another user may have written is not believed. Its modification time is its last use, give
or take a day.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vllmc.core.cache.files import IrregularFile, read_record, refresh, write_plain
from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.layout import Layout
from vllmc.core.cache.trust import Trust
from vllmc.core.errors import VllmcError

_DAY_SECONDS: Final = 86400


def recall(cache: Path | None, name: str) -> str | None:
    """The fact of this name; None where there is none that is whole, or no `cache`."""
    if cache is None:
        return None
    file = Layout(cache).fact(name)
    try:
        data, status = read_record(file)
        text = data.decode("utf-8")
    except (FileNotFoundError, IrregularFile, VllmcError, UnicodeDecodeError):
        return None
    if Trust().doubt(status) is not None:
        return None
    _, _, fact = text.partition("\n")
    if text != _sealed(name, fact):
        return None
    if time.time() - status.st_mtime > _DAY_SECONDS:
        refresh(file)
    return fact


def remember(cache: Path | None, name: str, fact: str) -> None:
    """Writes a fact, in place of any of its name."""
    if cache is None:
        return
    layout = Layout(cache)
    data = _sealed(name, fact).encode()
    with contextlib.suppress(VllmcError):
        write_plain(layout.fact(name), data, temporary=layout.temporary)


def remembered(cache: Path | None, name: str, compute: Callable[[], str]) -> str:
    """The fact of this name, or what `compute` finds, which is then remembered."""
    if (known := recall(cache, name)) is not None:
        return known
    fact = compute()
    remember(cache, name, fact)
    return fact


def _sealed(name: str, fact: str) -> str:
    return f"{sha256_hex(f'{name} {fact}')}\n{fact}"
