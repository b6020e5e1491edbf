"""vLLM's `vllm_compile_cache.py`: which artifact serves which piece and range.

The file is a Python literal, a dictionary from `(range, piece, compiler)` to a handle. The range
is `(start, end)` since vLLM 0.13, before that a size or None; a handle is `(name, path)`, since
0.16 inside a dictionary with a cache key. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vllmc.core.diagnose.foreign_files import Unreadable, clean, parse_literal

_ARTIFACT: Final = re.compile(
    r"artifact_(?:compile_range_(?P<start>\d+)_(?P<end>\d+)|shape_(?P<shape>\d+|None))"
    r"_subgraph_(?P<piece>\d+)"
)
ANY_SIZE: Final = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One line of the index: `path` is where the artifact was when it was stored."""

    range: str
    piece: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The entries of the index, and how many of them were not understood."""

    entries: tuple[IndexEntry, ...] = ()
    unknown: int = 0


def read_index(text: str) -> Index:
    """The index that `text` holds. Raises `Unreadable` where it is no dictionary."""
    value = parse_literal(text)
    if not isinstance(value, dict):
        raise Unreadable(f"a {type(value).__name__} where a dictionary belongs")
    entries = [_entry(key, handle) for key, handle in value.items()]
    known = tuple(entry for entry in entries if entry is not None)
    return Index(entries=known, unknown=len(entries) - len(known))


def artifact_place(name: str) -> tuple[str, int] | None:
    """The range and piece in an artifact's name; None where it is no artifact's."""
    if (match := _ARTIFACT.fullmatch(name)) is None:
        return None
    if match["shape"] is not None:
        size = ANY_SIZE if match["shape"] == "None" else match["shape"]
        return size, int(match["piece"][:9])
    return f"{match['start']}:{match['end']}", int(match["piece"][:9])


def _entry(key: object, handle: object) -> IndexEntry | None:
    if isinstance(handle, dict):
        handle = handle.get("graph_handle")
    match key, handle:
        case (shape, int(piece), str()), (str(), str(path)):
            return IndexEntry(range=_range(shape), piece=piece, path=clean(path))
        case _:
            return None


def _range(shape: object) -> str:
    match shape:
        case None:
            return ANY_SIZE
        case (int(start), int(end)):
            return f"{start}:{end}"
        case _:
            return clean(str(shape))
