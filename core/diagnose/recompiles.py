"""Recompiles, from wherever they were seen: which guard failed, how often, and what to change.

Live runs, logs and traces give `Event`s, one for each recompile; `summarize` makes the rows of
them that every report shows. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Any, Final

from vllmc.core.diagnose.fixes import fix_for, fix_for_dropped
from vllmc.core.diagnose.foreign_files import clean
from vllmc.core.diagnose.guards import Guard, RecompileClass, begins_entry, deciding, read_guard
from vllmc.core.diagnose.recompile_patterns import pattern

_MAX_VALUES: Final = 64
_COUNTER = re.compile(r"\d+$")
_CUT = Guard(entry="", text="", klass="other")
_CUT_FIX: Final = "make the log again with TORCH_LOGS=recompiles: here the reasons are cut off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One recompile: its frame (`file.py:12 in f`) and Dynamo's reasons, one per earlier entry.

    `seconds` is its compile time, None where that is not known. `limit_hit` says that it was
    refused and the frame ran eager. With `warned`, it is only the warning of that, which counts
    where nothing else is known of the frame.
    """

    frame: str
    reasons: tuple[str, ...]
    seconds: float | None = None
    limit_hit: bool = False
    warned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompile:
    """One cause of recompiles, as `--json` reports it. `count` recompiles had it.

    `guard`, `expected` and `observed` are those of the first. `cost_seconds` is the sum of their
    compile times, None where it is not known; `pattern` says in words how the values went on.
    """

    frame: str
    klass: RecompileClass
    guard: str
    subject: str
    expected: str
    observed: str
    fix: str
    count: int = 1
    limit_hit: bool = False
    cost_seconds: float | None = None
    pattern: str = ""
    dropped: bool = False

    def to_json(self) -> dict[str, Any]:
        """The RECOMPILE row of docs/cli.md."""
        row = asdict(self)
        row["class"] = row.pop("klass")
        return row


def frame_name(file: str, line: int, function: str) -> str:
    """How a frame is called in every report."""
    return clean(f"{PurePath(file).name}:{line} in {function}")


def split_reasons(text: str) -> tuple[str, ...]:
    """The reasons in a text of Dynamo's, one for each earlier entry that it lists."""
    lines = text.splitlines()
    return tuple(line for line in lines if begins_entry(line)) or tuple(lines[:1])


def summarize(events: Iterable[Event]) -> tuple[Recompile, ...]:
    """One row for each frame, class and subject, counted, in the order of their first events.

    Of the events only a few values for each row are kept.
    """
    groups: dict[tuple[str, str, str, int], _Group] = {}
    frames: set[str] = set()
    limited: set[str] = set()
    for event in events:
        if event.limit_hit:
            limited.add(event.frame)
        if event.warned and event.frame in frames:
            continue
        frames.add(event.frame)
        guards = [read_guard(reason) for reason in event.reasons]
        guard = deciding(guards) if guards else _CUT
        identity = (event.frame, guard.klass, guard.subject or guard.text, guard.nearness)
        if (group := groups.get(identity)) is None:
            group = groups[identity] = _Group(frame=event.frame, guard=guard)
        group.add(guard, event.seconds)
    return tuple(group.row(limit_hit=group.frame in limited) for group in groups.values())


def tally(frame: str, broken: Iterable[Guard]) -> tuple[Recompile, ...]:
    """One row for each guard that was dropped and that calls of `frame` have broken, counted."""
    groups: dict[str, _Group] = {}
    for guard in broken:
        groups.setdefault(guard.text, _Group(frame=frame, guard=guard)).add(guard, None)
    return tuple(
        replace(group.row(limit_hit=False), dropped=True, fix=fix_for_dropped(group.guard, frame))
        for group in groups.values()
    )


@dataclass(slots=True, kw_only=True)
class _Group:
    """What is gathered of the recompiles of one row; `guard` is that of the first."""

    frame: str
    guard: Guard
    count: int = 0
    seconds: float | None = None
    values: list[str] = field(default_factory=list)

    def add(self, guard: Guard, seconds: float | None) -> None:
        """Takes in one recompile."""
        self.count += 1
        if seconds is not None:
            self.seconds = (self.seconds or 0.0) + seconds
        if not self.values and (guard.expected.isdecimal() or "shape" not in guard.klass):
            self.values.append(guard.expected)
        # The entry compiled after a recompile expects what that recompile found.
        if self.count == 2 and not self.guard.observed and guard.entry == _next(self.guard.entry):
            observed = guard.expected if guard.expected != self.guard.expected else ""
            self.guard = replace(self.guard, observed=observed)
        value = guard.observed or guard.expected
        if len(self.values) < _MAX_VALUES and (guard.observed or self.values[-1:] != [value]):
            self.values.append(value)

    def row(self, *, limit_hit: bool) -> Recompile:
        """The row to report."""
        guard = self.guard
        return Recompile(
            frame=self.frame,
            klass=guard.klass,
            guard=guard.text,
            subject=guard.subject,
            expected=guard.expected,
            observed=guard.observed,
            fix=fix_for(guard, self.frame) if guard.text else _CUT_FIX,
            count=self.count,
            limit_hit=limit_hit,
            cost_seconds=self.seconds,
            pattern=pattern(guard.klass, self.values),
        )


def _next(entry: str) -> str:
    """The compilation after `entry`: `0/2` of `0/1`."""
    return _COUNTER.sub(lambda match: str(int(match[0]) + 1), entry) if entry else "none"
