"""What the cache holds: the entries of `cache ls` and the sums of `cache stats`. Imports no torch.

Both leave out records that cannot be read; `verify` names those.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.core.cache.files import plain_size
from vllmc.core.cache.key import JsonValue
from vllmc.core.cache.summary import ProgramSummary, program_summaries, unit_summaries
from vllmc.core.cache.usage import Counts, last_use, read_counts

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A program of the cache, with all its records. Times are in unix seconds.

    `model` and `created` are the newest record's, `bytes` the sum of its artifacts' sizes (each
    once), `units` counts the distinct compile units. Where no use is noted, `last_used` is when
    the latest record came into this cache.
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
    """A model's share: its program keys, the bytes of the artifacts that they name, their uses.

    The last four are those of `Counts`.
    """

    model: str
    programs: int
    bytes: int
    hits: int
    misses: int
    dups: int
    seconds_saved: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The cache in numbers.

    `programs` counts program keys, `units` unit records, `artifacts` blobs of `bytes` bytes in
    all; no readable record names `unreferenced_bytes` of them. Models share artifacts, so their
    bytes may add up to more than `bytes`. `inodes` counts files and directories. The uses are
    those of the programs that are stored, as `Counts` has them.
    """

    programs: int
    units: int
    artifacts: int
    bytes: int
    unreferenced_bytes: int
    inodes: int
    hits: int
    misses: int
    dups: int
    seconds_saved: float
    by_model: tuple[ModelStats, ...]


def entries(store: Store) -> tuple[Entry, ...]:
    """One entry per program key, the last used first."""
    # The summaries come by key.
    by_key = itertools.groupby(
        program_summaries(store.walk("programs")), key=lambda program: program.key
    )
    rows = [_entry(store, key, tuple(programs)) for key, programs in by_key]
    return tuple(sorted(rows, key=lambda entry: (-entry.last_used, entry.key)))


def stats(store: Store) -> Stats:
    """The sums over every artifact and every readable record."""
    sizes = {found.key: plain_size(found.path) or 0 for found in store.walk("blobs")}
    keys: defaultdict[str, set[str]] = defaultdict(set)
    artifacts: defaultdict[str, set[str]] = defaultdict(set)
    for program in program_summaries(store.walk("programs")):
        keys[program.model].add(program.key)
        artifacts[program.model].update(unit.artifact for unit in program.units)
    units = tuple(unit.artifact for unit in unit_summaries(store.walk("units")))
    named = set(units).union(*artifacts.values())
    uses = {key: _counts(store, key) for key in set().union(*keys.values())}
    return Stats(
        programs=len(uses),
        units=len(units),
        artifacts=len(sizes),
        bytes=sum(sizes.values()),
        unreferenced_bytes=sum(size for digest, size in sizes.items() if digest not in named),
        inodes=sum(_inodes(layout.root) for layout in store.layouts),
        **asdict(sum(uses.values(), Counts())),
        by_model=tuple(
            ModelStats(
                model=model,
                programs=len(keys[model]),
                bytes=sum(sizes.get(digest, 0) for digest in artifacts[model]),
                **asdict(sum((uses[key] for key in keys[model]), Counts())),
            )
            for model in sorted(keys)
        ),
    )


def _entry(store: Store, key: str, programs: Sequence[ProgramSummary]) -> Entry:
    newest = max(programs, key=lambda program: (program.created, program.id))
    artifacts = {unit.artifact for program in programs for unit in program.units}
    uses = [last_use(layout.used(key)) for layout in store.layouts]
    stored = [
        last_use(layout.program(key, program.id))
        for layout in store.layouts
        for program in programs
    ]
    noted = [time for time in uses if time is not None]
    return Entry(
        key=key,
        model=newest.model,
        created=newest.created,
        last_used=max(noted or [time for time in stored if time is not None], default=0.0),
        bytes=sum(store.artifact_size(digest) or 0 for digest in artifacts),
        units=len({unit.key for program in programs for unit in program.units}),
    )


def _counts(store: Store, key: str) -> Counts:
    return sum((read_counts(layout.used(key)) for layout in store.layouts), Counts())


def _inodes(root: Path) -> int:
    return sum(1 + len(files) for _, _, files in os.walk(root))
