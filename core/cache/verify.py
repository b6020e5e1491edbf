"""`cache verify`: what is wrong with a cache, and what to remove to mend it. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.core.cache.files import (
    CorruptRecordError,
    IrregularFile,
    open_plain,
    read_record,
    reading,
    writing,
)
from vllmc.core.cache.key import JsonValue
from vllmc.core.cache.layout import Found, Layout
from vllmc.core.cache.record import ProgramRecord, UnitRecord, noted_artifact
from vllmc.core.errors import VllmcError

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store

_REMOVED = frozenset({"corrupt-artifact", "missing-artifact", "corrupt-record"})
_HARMLESS = frozenset({"foreign-file", "format-too-new"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong. `path` is relative to the cache's first directory, or absolute.

    `kind` is the code of the error that using it would raise (`corrupt-artifact`,
    `corrupt-record`, `not-readable`, `bad-cache-dir`, `format-too-new`, `untrusted`; for
    `missing-artifact` the path is that of the record that names it), or `foreign-file`: vllmc did
    not write it, and never reads it.
    """

    path: str
    kind: str
    detail: str

    @property
    def unsafe(self) -> bool:
        """Whether the cache should not be used as it is; false for what vllmc never reads."""
        return self.kind not in _HARMLESS

    def to_json(self) -> dict[str, JsonValue]:
        """The problem as a row of `cache verify --json`."""
        return {"path": self.path, "kind": self.kind, "detail": self.detail}


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A file to remove, relative to the cache directory, and why."""

    path: str
    reason: str

    def to_json(self) -> dict[str, JsonValue]:
        """The removal as a row of a `--json` plan."""
        return {"path": self.path, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What to remove from the cache at `root`: records first, then the artifacts they named."""

    root: Path
    removals: tuple[Removal, ...]

    def execute(self) -> None:
        """Removes it; what is gone already is no error. Raises `not-writable`."""
        for removal in self.removals:
            remove(self.root / removal.path)


def remove(path: Path) -> None:
    """Removes a file, link or directory of the cache, or nothing where there is none."""
    with writing(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def verify(store: Store) -> tuple[Problem, ...]:
    """Reads every artifact and record of every layer, and names each problem, by path."""
    found = [(layout, f) for layout in store.layouts for f in layout.walk()]
    present = {f.key for _, f in found if f.section == "blobs"}
    problems = (_check(store, layout, f, present) for layout, f in found)
    return tuple(problem for problem in problems if problem is not None)


def plan_repair(store: Store, problems: Iterable[Problem]) -> RepairPlan:
    """Removes what is corrupt, and every record that names a corrupt or missing artifact.

    That is, of the first layer: what lies below it is only read. Each is looked at once more, as
    others may have mended it since.
    """
    ours = (p for p in problems if p.kind in _REMOVED and not Path(p.path).is_absolute())
    again = (
        _check(store, store.layout, store.layout.classify(store.root / p.path), set()) for p in ours
    )
    damage = tuple(p for p in again if p is not None and p.kind in _REMOVED)
    store = replace(store, below=())
    removals = {p.path: p.detail for p in damage}
    corrupt = {p.path for p in damage if p.kind == "corrupt-artifact"}
    layout = store.layout
    records: Iterator[UnitRecord | ProgramRecord] = chain(
        store.readable_programs(), store.readable_units()
    )
    for record in records if corrupt else ():
        names = (layout.relative(layout.blob(digest)) for digest in _artifacts(record))
        if broken := corrupt.intersection(names):
            path = (
                layout.program(record.key, record.id)
                if isinstance(record, ProgramRecord)
                else layout.unit(record.key)
            )
            removals[layout.relative(path)] = f"it refers to the corrupt {min(broken)}"
    # An interrupted repair must not leave a record that names an artifact it removed.
    order = sorted(removals, key=lambda path: (path in corrupt, path))
    return RepairPlan(
        root=store.root,
        removals=tuple(Removal(path=path, reason=removals[path]) for path in order),
    )


def _check(store: Store, layout: Layout, found: Found, present: set[str]) -> Problem | None:
    own = layout.root == store.root
    path = layout.relative(found.path) if own else str(found.path)
    if found.section == "foreign" and layout.is_directory_name(found.path):
        detail = "it is in the place of a directory: what lies or belongs there is not checked"
        return Problem(path=path, kind="bad-cache-dir", detail=detail)
    if found.section == "foreign":
        return Problem(path=path, kind="foreign-file", detail="vllmc did not write this file")
    try:
        if found.section == "blobs":
            return _check_blob(found, path)
        if found.section == "codes":
            return _check_note(found, path)
        if found.section not in ("programs", "units"):
            return _check_plain(found, path)
        record = store.check(found, layout)
    except VllmcError as error:
        detail = error.reason if isinstance(error, CorruptRecordError) else error.message
        return Problem(path=path, kind=error.code, detail=detail)
    if record is None:
        return None
    # An artifact that came since the walk, as its record did, is there.
    missing = sorted(
        digest
        for digest in set(_artifacts(record)) - present
        if not any(os.path.lexists(place.blob(digest)) for place in store.layouts)
    )
    if not missing:
        return None
    detail = f"it refers to artifacts that are not there: {', '.join(missing)}"
    return Problem(path=path, kind="missing-artifact", detail=detail)


def _check_blob(found: Found, path: str) -> Problem | None:
    try:
        with open_plain(found.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except IrregularFile as error:
        return Problem(path=path, kind="corrupt-artifact", detail=f"it is {error}")
    if digest == found.key:
        return None
    return Problem(path=path, kind="corrupt-artifact", detail=f"its SHA-256 is {digest}")


def _check_note(found: Found, path: str) -> Problem | None:
    try:
        if noted_artifact(read_record(found.path)[0], found.key) is not None:
            return None
        detail = "it is no note of this generated code"
    except FileNotFoundError:
        return None
    except IrregularFile as error:
        detail = f"it is {error}"
    return Problem(path=path, kind="corrupt-record", detail=detail)


def _check_plain(found: Found, path: str) -> Problem | None:
    """Of a file whose contents harm nobody: whether it is one."""
    with suppress(FileNotFoundError), reading(found.path):
        if not stat.S_ISREG(found.path.lstat().st_mode):
            return Problem(path=path, kind="corrupt-record", detail="it is not a plain file")
    return None


def _artifacts(record: UnitRecord | ProgramRecord) -> tuple[str, ...]:
    if isinstance(record, UnitRecord):
        return (record.artifact,)
    return tuple(unit.artifact for unit in record.units)
