"""The source files that were traced: named below their packages, and digested. No torch."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vllmc.core.cache.key import JsonValue

_GENERATED: Final = "<string>"


def sources(paths: Iterable[str]) -> list[JsonValue]:
    """Each file by its name below the directory of its package, with that and a digest."""
    found: list[JsonValue] = []
    for path in sorted(paths):
        root, name = _place(path)
        found.append({"name": name, "root": root, "digest": _digest(path)})
    return found


def code_hash(paths: Iterable[str]) -> str:
    """vLLM's hash of the traced files: their paths and contents."""
    parts = []
    for path in sorted(paths):
        if path == _GENERATED:
            continue
        parts.append(path)
        try:
            # As vLLM reads them, in the encoding of the locale.
            with open(path) as file:  # noqa: PTH123
                parts.append(file.read())
        except (OSError, UnicodeDecodeError):
            continue
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def inlined(model: Any) -> frozenset[str]:
    """The files that a whole model is checked against when it is loaded."""
    sources = model.aot_compiled_fn.source_info().inlined_sources
    modules = (sys.modules.get(source.module) for source in sources)
    return frozenset(str(module.__file__) for module in modules if module is not None)


def _place(path: str) -> tuple[str, str]:
    if path == _GENERATED:
        return "", path
    root = _root(Path(path).parent)
    return str(root), Path(path).relative_to(root).as_posix()


@functools.cache
def _root(directory: Path) -> Path:
    """The directory that the package of a directory's files lies in."""
    return _root(directory.parent) if (directory / "__init__.py").is_file() else directory


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""
