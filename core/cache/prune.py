"""`cache prune`: what may go, least recently used first, and removing it. Imports no torch.

A plan is made first and is a value; `execute` removes no more than it names. Whatever changes in
between stays: a program that is used or held, a unit or artifact that another program names now or
that a compilation has found (`Store.retain`). Programs go first, then units, the notes of
generated code, and artifacts, so what is interrupted leaves no record that names what is gone.
"""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from vllmc.core.cache.census import CacheFile, Census, StoredProgram, take_census
from vllmc.core.cache.files import make_directory, reading, writing
from vllmc.core.cache.key import JsonValue
from vllmc.core.cache.layout import Layout, Section
from vllmc.core.cache.retention import (
    Choice,
    Criteria,
    choose,
    fresh_facts,
    needed_files,
    parts_of,
    total_bytes,
    young_files,
)
from vllmc.core.cache.summary import program_summaries
from vllmc.core.cache.usage import claimed

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store

Kind: TypeAlias = Literal[
    "program", "use", "import", "unit", "code", "artifact", "fact", "temporary"
]

_HELD: Final = "a process holds it"
_YOUNG: Final = "it may be of a model that is being compiled now"
_CHANGED: Final = "it was used or stored again since the plan was made"
_NEEDED: Final = "a program that is stored by now needs it"
_FREED: Final = "no program that stays needs it"
_UNREFERENCED: Final = "nothing refers to it"
_ABANDONED: Final = "a process that died left it"
_FORGOTTEN: Final = "it was not asked for in 30 days"

_KINDS: Final[Mapping[Section, Kind]] = {
    "programs": "program",
    "used": "use",
    "imports": "import",
    "units": "unit",
    "codes": "code",
    "blobs": "artifact",
    "facts": "fact",
    "locks": "temporary",
    "tmp": "temporary",
}
_REASONS: Final[Mapping[Section, str]] = {
    "locks": _ABANDONED,
    "tmp": _ABANDONED,
    "facts": _FORGOTTEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneItem:
    """A file to remove or to keep, and why. `path` is relative to the cache directory.

    `key` is that of the program or unit, or the digest or name that the file goes by. `program`
    and `model` are those of the program that it is removed with, empty where nothing refers to it.
    """

    kind: Kind
    key: str
    path: str
    model: str
    program: str
    bytes: int
    reason: str
    mtime_ns: int

    def to_json(self) -> dict[str, JsonValue]:
        """The item as a row of `cache prune --json`."""
        return {
            "kind": self.kind,
            "key": self.key,
            "path": self.path,
            "model": self.model,
            "program": self.program,
            "bytes": self.bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """What to remove from the cache at `root`, in this order.

    `kept` is what would go but for its reason. The bytes are those of all files before, and of
    those that are left once the plan is executed.
    """

    root: Path
    removals: tuple[PruneItem, ...]
    kept: tuple[PruneItem, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What became of a plan: `removed` by this process; `kept` also for what happened since."""

    removed: tuple[PruneItem, ...]
    kept: tuple[PruneItem, ...]


def plan_prune(store: Store, criteria: Criteria) -> PrunePlan:
    """Decides what goes from the store's first layer, and removes nothing.

    Raises `not-readable`, `bad-cache-dir`, and what `writing` maps: the file system's clock is
    read off a file made in the cache.
    """
    layout = store.layout
    census = take_census(layout, elsewhere=_named_below(store))
    now_ns = _now_ns(layout) if census.files else 0
    held = frozenset(p.key for p in census.programs if _is_held(layout.used(p.key)))
    young = young_files(census, now_ns)
    facts = fresh_facts(census, now_ns)
    choice = choose(census, criteria, held, young | facts, now_ns)
    stays = needed_files(census, choice.staying, young | facts)
    describe = _Describer(layout, census, choice)
    spared = stays - needed_files(census, choice.staying, facts)
    return PrunePlan(
        root=store.root,
        removals=tuple(describe.removal(f) for f in census.files if f.path not in stays),
        kept=(
            *(describe.item(f, _HELD) for p in choice.held for f in p.records),
            *(describe.item(f, _YOUNG) for f in census.files if f.path in spared),
        ),
        bytes_before=total_bytes(census.files),
        bytes_after=total_bytes(f for f in census.files if f.path in stays),
    )


def execute(plan: PrunePlan) -> Pruned:
    """Removes what `plan` names and nothing has used, held or changed since.

    What is gone already is neither removed nor kept. Raises what `writing` maps, and what taking a
    census raises; what was removed by then stays removed.
    """
    executor = _Executor(plan)
    executor.remove_programs()
    executor.remove_rest()
    return Pruned(removed=tuple(executor.removed), kept=(*plan.kept, *executor.kept))


class _Executor:
    """Removes what a plan names, and notes what became of each item that was still there."""

    def __init__(self, plan: PrunePlan) -> None:
        self.removed: list[PruneItem] = []
        self.kept: list[PruneItem] = []
        self._layout = Layout(plan.root)
        self._of_program: defaultdict[str, list[PruneItem]] = defaultdict(list)
        self._rest: list[PruneItem] = []
        for item in plan.removals:
            own = item.kind in ("program", "use")
            (self._of_program[item.key] if own else self._rest).append(item)

    def remove_programs(self) -> None:
        """Removes records and notes of use, each program's under its lock."""
        for key, items in self._of_program.items():
            used = self._layout.used(key)
            with claimed(used) as free:
                if not free or _used_since(used, items):
                    self._keep(items, _CHANGED if free else _HELD)
                    continue
                for item in items:
                    self._remove(item)
                # Not empty where another version of the program was stored since.
                with suppress(OSError):
                    self._layout.programs(key).rmdir()

    def remove_rest(self) -> None:
        """Removes what the programs that are stored by now do not need."""
        if not self._rest:
            return
        census = take_census(self._layout)
        needed = needed_files(census, census.programs, frozenset())
        for item in self._rest:
            if self._layout.root / item.path in needed:
                self._keep([item], _NEEDED)
            else:
                self._remove(item)

    def _keep(self, items: Iterable[PruneItem], reason: str) -> None:
        self.kept.extend(replace(item, reason=reason) for item in items)

    def _remove(self, item: PruneItem) -> None:
        match _remove_unchanged(item, self._layout):
            case True:
                self.removed.append(item)
            case False:
                self._keep([item], _CHANGED)


def _named_below(store: Store) -> Iterator[str]:
    """The keys of the programs of the layers below, of their units, and their artifacts."""
    for lower in store.layouts[1:]:
        for program in program_summaries(lower.walk("programs")):
            yield program.key
            for unit in program.units:
                yield from (unit.key, unit.artifact)


class _Describer:
    """Words the items of a plan."""

    def __init__(self, layout: Layout, census: Census, choice: Choice) -> None:
        self._layout = layout
        self._owners: dict[Path, StoredProgram] = {}
        self._reasons = choice.reasons
        for program in census.programs:
            for file in program.records:
                self._owners[file.path] = program
        for program in choice.going:
            if program.key in census.used:
                self._owners[census.used[program.key].path] = program
            for file in parts_of(program, census):
                self._owners[file.path] = program
        for code in census.codes.values():
            artifact = census.blobs.get(census.artifact_of.get(code.path, ""))
            if artifact is not None and artifact.path in self._owners:
                self._owners[code.path] = self._owners[artifact.path]

    def removal(self, file: CacheFile) -> PruneItem:
        """A file that goes."""
        owner = self._owners.get(file.path)
        if owner is None:
            reason = _REASONS.get(file.section, _UNREFERENCED)
        elif file.section in ("programs", "used"):
            reason = self._reasons[owner.key]
        else:
            reason = _FREED
        return self.item(file, reason)

    def item(self, file: CacheFile, reason: str) -> PruneItem:
        """A file, for whatever reason."""
        owner = self._owners.get(file.path)
        return PruneItem(
            kind=_KINDS[file.section],
            key=file.key,
            path=self._layout.relative(file.path),
            model="" if owner is None else owner.model,
            program="" if owner is None else owner.key,
            bytes=file.bytes,
            reason=reason,
            mtime_ns=file.mtime_ns,
        )


def _is_held(used: Path) -> bool:
    with claimed(used) as free:
        return not free


def _used_since(used: Path, items: Iterable[PruneItem]) -> bool:
    """Whether a use was noted that the plan does not know of."""
    planned = next((item.mtime_ns for item in items if item.kind == "use"), None)
    return _mtime_ns(used) not in (None, planned)


def _mtime_ns(path: Path) -> int | None:
    with suppress(FileNotFoundError), reading(path):
        return path.lstat().st_mtime_ns
    return None


def _remove_unchanged(item: PruneItem, layout: Layout) -> bool | None:
    """Removes a file; False where it is younger than the plan says, None where it is gone."""
    path = layout.root / item.path
    found = _mtime_ns(path)
    if found != item.mtime_ns:
        return None if found is None else False
    # Out of the way before the last look: who refreshes it later finds it gone, and writes it.
    draft = layout.temporary / f"{os.getpid()}.{secrets.token_hex(8)}"
    with writing(path):
        try:
            path.rename(draft)
        except FileNotFoundError:
            return None
        if _mtime_ns(draft) != item.mtime_ns:
            draft.rename(path)
            return False
        draft.unlink(missing_ok=True)
        return True


def _now_ns(layout: Layout) -> int:
    """The time by the file system's clock, which all hosts that share it have in common."""
    draft = layout.temporary / f"{os.getpid()}.{secrets.token_hex(8)}"
    with writing(draft):
        make_directory(layout.temporary)
        draft.touch(exist_ok=False)
        try:
            return draft.stat().st_mtime_ns
        finally:
            draft.unlink(missing_ok=True)
