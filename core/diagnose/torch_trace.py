"""The logs that torch writes under `TORCH_TRACE`, entry by entry. Imports no torch.

There is one file per process. An entry is a line with a JSON object behind a prefix; its payload,
if it has one, is on the lines that follow and start with a tab:

    V1121 12:12:21.348 31490 torch/_logging/_internal.py:1328] {"artifact": {...}, "frame_id": 0}
    <tab>{"pytorch_version": "2.13.0"}

The first key of the object that says nothing of the entry's whereabouts is its kind. Source:
`TorchLogsFormatter` and `trace_structured` in torch/_logging/_internal.py, torch 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.foreign_files import Unreadable, clean, parse_json
from vllmc.core.errors import VllmcError

_LOG_SUFFIX = ".log"
_HEAD_BYTES = 1 << 16
_WHEREABOUTS = frozenset(
    {
        "rank", "compiled_autograd_id", "frame_id", "frame_compile_id", "attempt", "stack",
        "subgraph_name", "has_payload", "severity", "timestamp", "pathname", "thread",
    }
)  # fmt: skip
_PREFIX = re.compile(r"(?:\[rank\d+\]:\s*)?[VIWEC]\d{4,8} \d\d:\d\d:\d\d")
_RANK_OF_FILE = re.compile(r"rank_(\d{1,9})_")
_RANK_OF_LINE = re.compile(r"^\[rank(\d{1,9})\]")

Wanted = Callable[[str, JsonValue], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry: its kind (`artifact`), what is said of it, and its payload.

    `compile_id` is spelled as torch does (`0/1`, `!0/1/0`), and empty outside a compilation, of
    which torch may make several attempts; `rank` is that of the line, None where it has none.
    """

    kind: str
    data: JsonValue
    compile_id: str
    attempt: int
    rank: int | None
    payload: str

    def fields(self) -> dict[str, JsonValue]:
        """What is said of it, where that is an object; else nothing."""
        return self.data if isinstance(self.data, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLog:
    """One process's log, as far as it was asked for.

    `strings` is torch's table of file names. `odd_lines` counts the lines that are neither an
    entry nor part of a payload; `cut` says that the last line ends in the middle of an entry.
    """

    name: str
    rank: int | None
    began: str
    entries: tuple[Entry, ...]
    strings: Mapping[int, str]
    odd_lines: int
    cut: bool


def is_trace(path: Path) -> bool:
    """Whether a file is such a log, or a directory holds one. False where it cannot be read."""
    try:
        return bool(find_logs(path))
    except VllmcError:
        return False


def find_logs(path: Path) -> tuple[Path, ...]:
    """The logs at `path`, by name: itself, or those directly in a directory.

    Raises `VllmcError` (`unreadable-trace`).
    """
    try:
        if not path.is_dir():
            return (path,) if path.is_file() and _begins_as_log(path) else ()
        files = sorted(p for p in path.iterdir() if p.suffix == _LOG_SUFFIX and p.is_file())
        return tuple(file for file in files if _begins_as_log(file))
    except OSError as error:
        raise _unreadable(path, error) from error


def read_log(path: Path, wanted: Wanted) -> TraceLog:
    """Reads a log; entries for whose kind and data `wanted` is false are passed over.

    Whatever the file holds, what can be read of it is returned. Raises `VllmcError`
    (`unreadable-trace`) where the disk fails.
    """
    entries: list[Entry] = []
    strings: dict[int, str] = {}
    odd_lines, whole, began = 0, True, ""
    try:
        for line, payload in _blocks(path):
            if (found := _object(line)) is None:
                odd_lines += 1
                whole = False
                continue
            whole = True
            prefix, record = found
            began = began or prefix
            kind = next((name for name in record if name not in _WHEREABOUTS), "")
            if kind == "str":
                strings |= _interned(record[kind])
            elif wanted(kind, record.get(kind)):
                entries.append(_entry(kind, prefix, record, _text(b"".join(payload))))
    except OSError as error:
        raise _unreadable(path, error) from error
    of_file = _RANK_OF_FILE.search(path.name)
    ranks = [entry.rank for entry in entries if entry.rank is not None]
    return TraceLog(
        name=path.name,
        rank=int(of_file[1]) if of_file else next(iter(ranks), None),
        began=began,
        entries=tuple(entries),
        strings=strings,
        odd_lines=odd_lines - (not whole),
        cut=not whole,
    )


def iter_log(path: Path, wanted: Wanted) -> Iterator[Entry]:
    """The entries of a log, one at a time, torch's strings among them; else as `read_log`."""
    try:
        for line, payload in _blocks(path):
            if (found := _object(line)) is not None:
                prefix, record = found
                kind = next((name for name in record if name not in _WHEREABOUTS), "")
                if wanted(kind, record.get(kind)):
                    yield _entry(kind, prefix, record, _text(b"".join(payload)))
    except OSError as error:
        raise _unreadable(path, error) from error


def json_of(text: str) -> Any:
    """The JSON value that `text` is; None where it is none."""
    try:
        return parse_json(text)
    except Unreadable:
        return None


def _blocks(path: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Each line that is not blank and no payload, with the lines of the payload below it."""
    head, payload = "", list[bytes]()
    with path.open("rb") as file:
        for line in file:
            if line.startswith(b"\t"):
                payload.append(line[1:])
                continue
            if head:
                yield head, payload
            head, payload = _text(line).strip(), []
    if head:
        yield head, payload


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").removesuffix("\n")


def _object(line: str) -> tuple[str, dict[str, JsonValue]] | None:
    """The prefix of a line and the object behind it; None for a line that is no entry."""
    start = line.find("{")
    if start < 0:
        return None
    record = json_of(line[start:])
    return (line[:start], record) if isinstance(record, dict) and record else None


def _entry(kind: str, prefix: str, record: dict[str, JsonValue], payload: str) -> Entry:
    rank = record.get("rank")
    of_line = _RANK_OF_LINE.match(prefix)
    return Entry(
        kind=kind,
        data=record.get(kind),
        compile_id=_compile_id(record),
        attempt=attempt if isinstance(attempt := record.get("attempt"), int) else 0,
        rank=rank if isinstance(rank, int) else int(of_line[1]) if of_line else None,
        payload=payload,
    )


def _compile_id(record: dict[str, JsonValue]) -> str:
    autograd, frame, count = (
        record.get(name) for name in ("compiled_autograd_id", "frame_id", "frame_compile_id")
    )
    of_frame = "" if frame is None else f"{frame}/{count}"
    if autograd is None:
        return of_frame
    return f"!{autograd}/{of_frame}" if of_frame else f"!{autograd}"


def _interned(data: JsonValue) -> dict[int, str]:
    match data:
        case [str(text), int(number)]:
            return {number: clean(text)}
    return {}


def _begins_as_log(path: Path) -> bool:
    """Whether one of the first lines is an entry with a kind of its own."""
    with path.open("rb") as file:
        head = _text(file.read(_HEAD_BYTES))
    found = (_object(line) for line in head.split("\n") if not line.startswith("\t"))
    return any(e and _PREFIX.match(e[0]) and e[1].keys() - _WHEREABOUTS for e in found)


def _unreadable(path: Path, error: OSError) -> VllmcError:
    return VllmcError(
        "unreadable-trace",
        f"{path} cannot be read: {error.strerror or error}",
        context={"path": str(path)},
        hint="give the directory that TORCH_TRACE named, or one of its log files",
    )
