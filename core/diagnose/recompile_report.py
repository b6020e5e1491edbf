"""The recompiles that a log or a `TORCH_TRACE` directory holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.foreign_files import clean
from vllmc.core.diagnose.recompiles import (
    Event,
    Recompile,
    frame_name,
    split_reasons,
    summarize,
)
from vllmc.core.diagnose.torch_log import GraphBreak, read_log_events
from vllmc.core.diagnose.torch_trace import Entry, find_logs, iter_log, json_of
from vllmc.core.errors import VllmcError

_NOTHING = "no line of TORCH_LOGS=recompiles, and no warning of the recompile limit, is in this log"
_REASONS = "recompile_reasons"
_BREAK = "dynamo_graph_break_reason"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecompileReport:
    """What was found: recompiles, and apart from them graph breaks and first compilations.

    `first_compilations` is None where it is not known.
    """

    recompiles: tuple[Recompile, ...]
    graph_breaks: int
    first_compilations: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _First:
    """The first compilation of a frame."""


def read_recompiles(path: Path) -> RecompileReport:
    """Reads a log or a trace, which is told by its contents.

    Raises `VllmcError`: `no-such-path`, `no-trace` for a directory without one, `unreadable-log`,
    `unreadable-trace`.
    """
    if not path.exists():
        raise VllmcError(
            "no-such-path",
            f"there is no {path}",
            hint="give a log made with TORCH_LOGS=recompiles, or a TORCH_TRACE directory",
        )
    if logs := find_logs(path):
        return _report((found for log in logs for found in _trace_events(log)), trace=True)
    if path.is_dir():
        raise VllmcError(
            "no-trace",
            f"{path} holds no log of TORCH_TRACE",
            hint="give the directory that TORCH_TRACE named; a text log is given as a file",
        )
    return _report(read_log_events(path), trace=False)


def _report(found: Iterable[Event | GraphBreak | _First], *, trace: bool) -> RecompileReport:
    breaks = firsts = cut = 0

    def events() -> Iterator[Event]:
        nonlocal breaks, firsts, cut
        for item in found:
            if isinstance(item, Event):
                cut += not item.reasons
                yield item
            elif isinstance(item, GraphBreak):
                breaks += 1
            else:
                firsts += 1

    rows = summarize(events())
    notes = [f"the reasons of {cut} of the recompiles are cut off"] if cut else []
    if not (trace or rows or breaks):
        notes.append(_NOTHING)
    return RecompileReport(
        recompiles=rows,
        graph_breaks=breaks,
        first_compilations=firsts if trace else None,
        notes=tuple(notes),
    )


def _wanted(kind: str, data: JsonValue) -> bool:
    if kind == "artifact":
        return isinstance(data, dict) and data.get("name") in (_REASONS, _BREAK)
    return kind in ("str", "dynamo_start", "compilation_metrics")


def _trace_events(path: Path) -> Iterator[Event | GraphBreak | _First]:
    """What one process's trace tells, each recompile when its compilation ends."""
    strings: dict[int, str] = {}
    frames: dict[str, str] = {}
    open_: dict[str, tuple[str, ...]] = {}
    for entry in iter_log(path, _wanted):
        frame_id, _, count = entry.compile_id.rpartition("/")
        if entry.kind == "str":
            _intern(entry.data, strings)
        elif entry.kind == "dynamo_start":
            frames[frame_id] = _started(entry, strings) or frames.get(frame_id, "")
            if count == "0" and entry.attempt == 0:
                yield _First()
        elif entry.kind == "compilation_metrics":
            if (reasons := open_.pop(entry.compile_id, None)) is not None:
                yield _ended(entry, reasons, frames.get(frame_id, ""))
        elif entry.fields().get("name") == _BREAK:
            yield GraphBreak()
        elif entry.attempt == 0:
            open_[entry.compile_id] = _payload_reasons(entry.payload)
    for compile_id, reasons in open_.items():
        yield Event(frame=frames.get(compile_id.rpartition("/")[0], ""), reasons=reasons)


def _ended(entry: Entry, reasons: tuple[str, ...], frame: str) -> Event:
    seconds = entry.fields().get("entire_frame_compile_time_s")
    failure = entry.fields().get("fail_reason")
    limit_hit = isinstance(failure, str) and "recompile limit exceeded" in failure
    limit_hit |= entry.fields().get("fail_type") == "FailOnRecompileLimitHit"
    return Event(
        frame=frame,
        reasons=reasons,
        seconds=float(seconds) if isinstance(seconds, int | float) and not limit_hit else None,
        limit_hit=limit_hit,
    )


def _payload_reasons(payload: str) -> tuple[str, ...]:
    """The reasons, which torch writes as a list, or as a text where there is one alone."""
    value = json_of(payload)
    if isinstance(value, list):
        return tuple(item for item in value if isinstance(item, str))
    return split_reasons(payload)


def _started(entry: Entry, strings: dict[int, str]) -> str:
    """The frame at the end of the stack that a compilation starts with; empty where unknown."""
    stack = entry.fields().get("stack")
    last = stack[-1] if isinstance(stack, list) and stack else None
    match last:
        case {"filename": int(number), "line": int(line), "name": str(name)}:
            return frame_name(strings.get(number, "?"), line, name)
    return ""


def _intern(data: JsonValue, strings: dict[int, str]) -> None:
    match data:
        case [str(text), int(number)]:
            strings[number] = clean(text)
