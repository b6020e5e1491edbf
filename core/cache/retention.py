"""Retention: which programs stay under given criteria, and which files they need. Imports no torch.

Programs are taken in the order of their last use. The files that nothing refers to stay for a
while: a unit is stored before the program that it is of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from vllmc.core.cache.census import CacheFile, Census, StoredProgram

GRACE_SECONDS: Final = 3600.0
"""What nothing refers to and is younger may be of a program that is being compiled now."""

FACT_SECONDS: Final = 30 * 86400.0
"""A fact that nobody has asked for in this time is found anew if it is needed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """Which programs go; what is None asks for nothing.

    `max_bytes` is for the whole cache, `older_than` in seconds since the last use, `max_count` a
    number of programs. With `other_torch` those go that take another torch than this version.
    """

    max_bytes: int | None = None
    older_than: float | None = None
    max_count: int | None = None
    other_torch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which programs stay and which go, why, and which would go if they were not held."""

    staying: tuple[StoredProgram, ...]
    going: tuple[StoredProgram, ...]
    held: tuple[StoredProgram, ...]
    reasons: Mapping[str, str]


def choose(
    census: Census,
    criteria: Criteria,
    held: frozenset[str],
    young: frozenset[Path],
    now_ns: int,
) -> Choice:
    """The fewest programs whose going meets all criteria; all that may go where none suffice.

    `held` are the keys of programs that stay, whatever is asked; `young` are files that do.
    """
    programs = census.programs
    ages = [now_ns / 1e9 - program.last_used for program in programs]
    wanted = criteria.other_torch
    other = {p.key for p in programs if wanted is not None and p.torch not in (None, wanted)}

    def staying(count: int) -> tuple[StoredProgram, ...]:
        """What is left without the `count` that were used the longest ago."""
        return tuple(
            program
            for index, program in enumerate(programs)
            if program.key in held or (index >= count and program.key not in other)
        )

    def least(enough: Callable[[tuple[StoredProgram, ...]], bool]) -> int:
        counts = range(len(programs))
        return bisect_left(counts, True, key=lambda count: enough(staying(count)))

    def fits(left: tuple[StoredProgram, ...]) -> bool:
        needed = needed_files(census, left, young)
        size = total_bytes(f for f in census.files if f.path in needed)
        return criteria.max_bytes is None or size <= criteria.max_bytes

    limit, oldest = criteria.max_count, criteria.older_than
    by_age = 0 if oldest is None else sum(age > oldest for age in ages)
    by_count = 0 if limit is None else least(lambda left: len(left) <= limit)
    by_size = 0 if criteria.max_bytes is None else least(fits)
    reasons = {}
    for index, (program, age) in enumerate(zip(programs, ages, strict=True)):
        if program.key in other:
            reasons[program.key] = f"it takes torch {program.torch}"
        elif index < by_age:
            reasons[program.key] = f"last used {_in_words(age)} ago"
        elif index < by_count:
            reasons[program.key] = f"least recently used of more than {limit}"
        elif index < by_size:
            reasons[program.key] = "least recently used of what takes too much room"
    left = staying(max(by_age, by_count, by_size))
    return Choice(
        staying=left,
        going=tuple(p for p in programs if p.key in reasons and p.key not in held),
        held=tuple(p for p in left if p.key in reasons),
        reasons=reasons,
    )


def young_files(census: Census, now_ns: int) -> frozenset[Path]:
    """The files that may be of a program that is being compiled now.

    They are younger than the grace period, and than every program's record that refers to them.
    """
    stored: defaultdict[Path, int] = defaultdict(int)
    for program in census.programs:
        when = max(record.mtime_ns for record in program.records)
        for file in parts_of(program, census):
            stored[file.path] = max(stored[file.path], when)
    for code in census.codes.values():
        artifact = census.blobs.get(census.artifact_of.get(code.path, ""))
        if artifact is not None:
            stored[code.path] = stored[artifact.path]
    after = now_ns - int(GRACE_SECONDS * 1e9)
    programs = {program.key for program in census.programs}
    orphans = (file for key, file in census.used.items() if key not in programs)
    tables = (
        census.imports.values(),
        census.units.values(),
        census.codes.values(),
        census.blobs.values(),
    )
    candidates = (*orphans, *chain.from_iterable(tables), *census.temporary)
    return frozenset(f.path for f in candidates if f.mtime_ns > max(after, stored[f.path]))


def fresh_facts(census: Census, now_ns: int) -> frozenset[Path]:
    """The facts that somebody may ask for again."""
    after = now_ns - int(FACT_SECONDS * 1e9)
    return frozenset(fact.path for fact in census.facts.values() if fact.mtime_ns > after)


def parts_of(program: StoredProgram, census: Census) -> Iterator[CacheFile]:
    """The units of a program, and the artifacts that it and they name."""
    units = [census.units[key] for key in program.units if key in census.units]
    digests = program.artifacts.union(
        census.artifact_of[unit.path] for unit in units if unit.path in census.artifact_of
    )
    yield from units
    yield from (census.blobs[digest] for digest in digests if digest in census.blobs)


def needed_files(
    census: Census, staying: Iterable[StoredProgram], young: frozenset[Path]
) -> frozenset[Path]:
    """The files of the programs that stay, what they refer to, and what is `young`.

    A unit's record that cannot be read is left to `verify`.
    """
    staying = tuple(staying)
    keys = census.mentioned.union(*(program.units for program in staying))
    readable = census.artifact_of
    units = {
        unit.path
        for key, unit in census.units.items()
        if key in keys or unit.path in young or unit.path not in readable
    }
    digests = census.mentioned.union(*(program.artifacts for program in staying))
    used = census.mentioned.union(program.key for program in staying)
    digests |= {readable[path] for path in units if path in readable}
    digests |= {digest for digest, blob in census.blobs.items() if blob.path in young}
    return young.union(
        units,
        (record.path for program in staying for record in program.records),
        (file.path for key, file in census.used.items() if key in used),
        (
            f.path
            for f in census.imports.values()
            if not used.isdisjoint(census.programs_of[f.path])
        ),
        (blob.path for digest, blob in census.blobs.items() if digest in digests),
        (f.path for f in census.codes.values() if readable.get(f.path) in digests),
    )


def total_bytes(files: Iterable[CacheFile]) -> int:
    """The sum of the files' sizes."""
    return sum(file.bytes for file in files)


def _in_words(seconds: float) -> str:
    """A span of time, roughly: `40 days`, `5 hours`, `12 minutes`."""
    for name, unit in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 60:.0f} minutes"
