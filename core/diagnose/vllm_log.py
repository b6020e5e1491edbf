"""vLLM's debug logs: the cache key factors that each start dumped. Imports no torch.

With VLLM_LOGGING_LEVEL=DEBUG vLLM logs, for every rank and part of the model,

    torch.compile cache factors: env=... cfg=... comp=... code=... dir=...
    Compile env factors (raw):
    {'CMAKE_BUILD_TYPE': None,
     'CUDA_HOME': None,
     ...}
    Vllm config hash: ...

with its prefix (`(EngineCore pid=42) DEBUG 06-20 14:45:37 [compilation/backends.py:1091] `) before
each line, and whatever collects logs may put something before that, or wrap lines in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from vllmc.core.diagnose.foreign_files import Unreadable, clean, parse_literal
from vllmc.core.diagnose.vllm_factors import HASHES, KeyFacts, key_facts
from vllmc.core.errors import VllmcError

_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX: Final = re.compile(
    r"(?:\((?P<process>[^()]*\bpid=\d+[^()]*)\) )?"
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:[.,]\d+)? \[[^\]]*:\d+\] ?"
)
_COLLECTOR: Final = re.compile(r"^\S+ (?:stdout|stderr) [FP] ")
_MESSAGES: Final = ("message", "msg", "log")

_FACTORS: Final = "torch.compile cache factors:"
_RAW: Final = "Compile env factors (raw):"
_END: Final = "Vllm config hash:"
_TRACED: Final = "Traced files (to be considered for compilation cache):"
_USING: Final = "Using cache directory: "
_LOADED: Final = "Directly load AOT compilation from path "
_AGAIN: Final = "Compiling model again due to a load failure from "
_OFF: Final = "vLLM's torch.compile cache is disabled"
_MARKERS: Final = (_FACTORS, _RAW, _END, _TRACED, _USING, _LOADED, _AGAIN, _OFF)
_TELLING: Final = tuple(m.encode() for m in (_FACTORS, _USING, _LOADED, _AGAIN, _OFF))

_FIELD: Final = re.compile(r"\b(env|cfg|comp|code)=([0-9A-Za-z]+)")
_DIRECTORY: Final = re.compile(r"\bdir=(.+)$")
_USED: Final = re.compile(re.escape(_USING) + r"(.+?)(?: for vLLM's torch\.compile|$)")
_ENTRY: Final = re.compile(r"[\s{]*'(?P<name>\w+)': ?(?P<value>.*)")
_NAMES: Final = {"cfg": "config", "comp": "compiler", "code": "code"}
_LINE: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDump:
    """One dump: what the key in `directory` was made of.

    `label` is `rank_0_0/backbone`; `key` and `label` are empty where the directory is not known.
    `sources` are the traced files; `line` is where in the log it stands.
    """

    line: int
    directory: str
    facts: KeyFacts
    sources: tuple[str, ...]

    @property
    def key(self) -> str:
        """vLLM's hash: the name of the directory above the rank's."""
        parts = PurePosixPath(self.directory).parts
        ranks = [i for i, part in enumerate(parts) if part.startswith("rank_")]
        return parts[ranks[-1] - 1] if ranks and ranks[-1] else ""

    @property
    def label(self) -> str:
        """The rank and the part of the model."""
        parts = PurePosixPath(self.directory).parts
        ranks = [i for i, part in enumerate(parts) if part.startswith("rank_")]
        return "/".join(parts[ranks[-1] :]) if ranks else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLog:
    """The dumps of a log, in their order; `loaded` are the whole models that were loaded.

    `notes` are what vLLM itself says of its cache, and what was not understood.
    """

    dumps: tuple[LogDump, ...]
    loaded: tuple[str, ...]
    notes: tuple[str, ...]


def is_vllm_log(path: Path) -> bool:
    """Whether a file holds a line in which vLLM says something of its compile cache."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_LINE):
                if any(marker in line for marker in _TELLING):
                    return True
    except OSError:
        return False
    return False


def read_log(path: Path) -> VllmLog:
    """What a log tells of vLLM's cache keys. Raises `VllmcError` (`not-readable`)."""
    reader = _Reader()
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LINE):
                number += 1
                for process, text in _messages(line.decode("utf-8", "replace")):
                    reader.read(process, text, number)
    except OSError as error:
        raise VllmcError(
            "not-readable", f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    return reader.finish()


def _messages(line: str) -> Iterator[tuple[str, str]]:
    """The process and the text of each line of a message, without what stands before it."""
    owner, parts = _unwrapped(_ANSI.sub("", line).rstrip("\r\n"))
    for part in parts:
        part = _COLLECTOR.sub("", part).rstrip("\r\n")
        prefix = _PREFIX.search(part)
        if prefix is None:
            yield owner, part
        else:
            yield prefix["process"] or owner, part[prefix.end() :]


def _unwrapped(line: str) -> tuple[str, Iterable[str]]:
    """The process and lines inside a JSON object, as Docker and JSON loggers write them."""
    if not line.startswith("{") or not line.endswith("}"):
        return "", (line,)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "", (line,)
    texts = [value.get(name) for name in _MESSAGES] if isinstance(value, dict) else []
    text = next((text for text in texts if isinstance(text, str)), None)
    if text is None:
        return "", (line,)
    return str(value.get("process", "")), _ANSI.sub("", text).split("\n")


@dataclass(slots=True, kw_only=True)
class _Open:
    """A dump that is being read."""

    line: int
    directory: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    entries: list[tuple[str, str]] = field(default_factory=list)
    raw: bool = False
    sources: tuple[str, ...] = ()


@dataclass(slots=True)
class _Process:
    """What one process is in the middle of saying; `before` is what stands before its messages."""

    saying: str = ""
    before: str = ""
    sources: list[str] = field(default_factory=list)
    dump: _Open | None = None


class _Reader:
    """Puts the dumps of several processes together from lines in any order."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}
        self._dumps: list[_Open] = []
        self._loaded: list[str] = []
        self._said: list[str] = []

    def read(self, process: str, text: str, number: int) -> None:
        """Takes the next line of a process."""
        state = self._processes.setdefault(process, _Process())
        marker = next((marker for marker in _MARKERS if marker in text), None)
        if marker is None:
            self._go_on(state, text)
            return
        state.saying = marker
        state.before = text[: text.index(marker)]
        if marker == _TRACED:
            state.sources = []
        elif marker == _LOADED:
            self._loaded.append(clean(text.partition(_LOADED)[2]))
        elif marker == _AGAIN:
            why = clean(text.partition(", reason: ")[2]) or "no reason is given"
            self._said.append(f"line {number}: a stored model could not be used: {why}")
        elif marker == _OFF:
            self._said.append(f"line {number}: vLLM's cache is off, so nothing is stored or loaded")
        elif marker == _USING and (used := _USED.search(text)) is not None:
            self._dump(state, number, clean(used[1]))
        elif marker == _FACTORS:
            directory = _DIRECTORY.search(text)
            dump = self._dump(state, number, clean(directory[1]) if directory else "")
            dump.hashes = dict(_FIELD.findall(text))
        elif marker == _RAW and state.dump is not None:
            state.dump.raw = True

    def finish(self) -> VllmLog:
        """All that was read."""
        notes = self._said
        dumps = tuple(_closed(dump, notes) for dump in self._dumps)
        return VllmLog(dumps=dumps, loaded=tuple(dict.fromkeys(self._loaded)), notes=tuple(notes))

    def _dump(self, state: _Process, number: int, directory: str) -> _Open:
        # vLLM names the directory first, and once more with the factors.
        known = state.dump
        if known is None or known.hashes or (directory and known.directory != directory):
            known = _Open(line=number, directory=directory)
            self._dumps.append(known)
            state.dump = known
        known.sources = tuple(state.sources)
        return known

    @staticmethod
    def _go_on(state: _Process, text: str) -> None:
        text = text.removeprefix(state.before)
        if state.saying == _TRACED and text.startswith(("/", "<")):
            state.sources.append(clean(text))
        elif state.saying == _RAW and state.dump is not None:
            if (entry := _ENTRY.fullmatch(text)) is not None:
                state.dump.entries.append((entry["name"], entry["value"]))
            elif state.dump.entries and text[:1] in (" ", "\t"):
                name, value = state.dump.entries[-1]
                state.dump.entries[-1] = (name, f"{value}\n{text}")
            else:
                state.saying = ""
        else:
            state.saying = ""


def _closed(dump: _Open, notes: list[str]) -> LogDump:
    where = f"line {dump.line}"
    environment = {}
    unknown = []
    for name, text in dump.entries:
        try:
            environment[name] = _value(text)
        except Unreadable:
            unknown.append(name)
    if unknown:
        notes.append(f"{where}: cut short or not understood: {', '.join(unknown[:5])}")
    hashes = {_NAMES[name]: digest for name, digest in dump.hashes.items() if name in _NAMES}
    facts = key_facts(
        environment,
        {name: hashes[name] for name in HASHES if name in hashes},
        dump.hashes.get("env", ""),
    )
    if dump.hashes and not dump.raw:
        notes.append(f"{where}: the environment's factors are not in the log, only their hash")
    elif dump.hashes and not facts.complete:
        notes.append(f"{where}: the dump is incomplete: its factors do not make its hash")
    return LogDump(
        line=dump.line,
        directory=dump.directory,
        facts=facts,
        sources=dump.sources,
    )


def _value(text: str) -> object:
    text = text.strip()
    if not text.endswith((",", "}")) or text == ",":
        raise Unreadable("cut short")
    text = text.removesuffix(",")
    # In brackets, as a long text is printed in parts, one per line.
    try:
        return parse_literal(f"({text})")
    except Unreadable:
        # The last entry has the dictionary's own bracket behind it.
        return parse_literal(f"({text.removesuffix('}')})")
