"""What the cache holds: the entries of `cache ls` and the sums of `cache stats`. Imports no torch.

Both leave out records that cannot be read; `verify` names those.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmc.core.cache.files import plain_size, reading
from vllmc.core.cache.key import JsonValue
from vllmc.core.cache.record import Outline

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A program of the cache, with all its records. Times are in unix seconds.

    `model` and `created` are the newest record's, `bytes` the sum of its artifacts' sizes (each
    once), `units` counts the distinct compile units.
    """

    key: str
    model: str
    created: float
    last_used: float
    bytes: int
    units: int

    def to_json(self) -> dict[str, JsonValue]:
        """The entry as a row of `cache ls --json`."""
        return {
            "key": self.key,
            "model": self.model,
            "created": self.created,
            "last_used": self.last_used,
            "bytes": self.bytes,
            "units": self.units,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """A model's share: its program keys, and the bytes of the artifacts that they name."""

    model: str
    programs: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The cache in numbers.

    `programs` counts program keys, `units` unit records, `artifacts` blobs of `bytes` bytes in
    all; no readable record names `unreferenced_bytes` of them. Models share artifacts, so their
    bytes may add up to more than `bytes`.
    """

    programs: int
    units: int
    artifacts: int
    bytes: int
    unreferenced_bytes: int
    by_model: tuple[ModelStats, ...]


def entries(store: Store) -> tuple[Entry, ...]:
    """One entry per program key, the last used first."""
    # The outlines come by key.
    by_key = itertools.groupby(store.outlines(), key=lambda outline: outline.key)
    rows = [_entry(store, key, tuple(outlines)) for key, outlines in by_key]
    return tuple(sorted(rows, key=lambda entry: (-entry.last_used, entry.key)))


def stats(store: Store) -> Stats:
    """The sums over every artifact and every readable record."""
    sizes = {found.key: plain_size(found.path) or 0 for found in store.walk("blobs")}
    keys: defaultdict[str, set[str]] = defaultdict(set)
    artifacts: defaultdict[str, set[str]] = defaultdict(set)
    for program in store.outlines():
        keys[program.model].add(program.key)
        artifacts[program.model].update(unit.artifact for unit in program.units)
    units = tuple(unit.artifact for unit in store.readable_units())
    named = set(units).union(*artifacts.values())
    return Stats(
        programs=len(set().union(*keys.values())),
        units=len(units),
        artifacts=len(sizes),
        bytes=sum(sizes.values()),
        unreferenced_bytes=sum(size for digest, size in sizes.items() if digest not in named),
        by_model=tuple(
            ModelStats(
                model=model,
                programs=len(keys[model]),
                bytes=sum(sizes.get(digest, 0) for digest in artifacts[model]),
            )
            for model in sorted(keys)
        ),
    )


def _entry(store: Store, key: str, outlines: Sequence[Outline]) -> Entry:
    newest = max(outlines, key=lambda outline: (outline.created, outline.id))
    artifacts = {unit.artifact for outline in outlines for unit in outline.units}
    return Entry(
        key=key,
        model=newest.model,
        created=newest.created,
        last_used=max(newest.created, _used(store, key)),
        bytes=sum(store.artifact_size(digest) or 0 for digest in artifacts),
        units=len({unit.key for outline in outlines for unit in outline.units}),
    )


def _used(store: Store, key: str) -> float:
    times = [0.0]
    for layout in store.layouts:
        path = layout.used(key)
        with suppress(FileNotFoundError), reading(path):
            times.append(path.lstat().st_mtime)
    return max(times)
