"""What `TORCH_LOGS=recompiles` or `recompiles_verbose` wrote, amid whatever else a log holds.

A recompile is a header and the guards that failed, one line or more each. Lines come with glog's
prefix, the bracketed one of torch 2.1, or none; before these there may be a rank or the name of
the process. What other processes wrote in between is told by these. The log is read line by line
and never held. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from vllmc.core.diagnose.guards import begins_entry
from vllmc.core.diagnose.recompiles import Event, frame_name
from vllmc.core.errors import VllmcError

_MAX_LINE: Final = 1 << 16
_MAX_REASONS: Final = 512
_MAX_REASON: Final = 2000
_MAX_OPEN: Final = 256

_PREFIX = re.compile(
    r"^(?P<lead>.{0,200}?)"
    r"(?:[VIWEC]\d{4,8} \d\d:\d\d:\d\d\.\d+ (?P<pid>\d+) \S+:\d+\](?P<tags>(?: \[[^\]]*\])*)"
    r"|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\](?P<marks>(?: \[[^\]]*\])*) [\w.]+: \[[A-Z]+\]) ?"
)
_HEADER = re.compile(r"Recompiling function (?P<function>.+) in (?P<file>.+):(?P<line>\d+)\s*$")
_LIMIT = re.compile(r"torch\._dynamo hit config\.\w+ \(\d+\)")
_FUNCTION = re.compile(r"^\s*function: '(?P<function>.+)' \((?P<file>.+):(?P<line>\d+)\)\s*$")
_LAST_REASON = re.compile(r"^\s*(?:last reason|reasons): (?P<reason>.*)$")
_REASON = re.compile(r"^ {4}- (?P<reason>\S.*)$")
_GRAPH_BREAK = re.compile(r"^\s*Graph break (?:\(.*\) )?in user code at |^\s*Graph break: ")
_MARKERS: Final = (
    b"    - ", b"Recompiling function ", b"hit config.", b"function: '", b"reason", b"Graph break",
)  # fmt: skip

Sender: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """A graph break that a log tells of: no recompile."""


@dataclass(slots=True)
class _Block:
    """What is known so far of one recompile, or of one warning of the limit.

    `about` are the marks that its lines have in common: the compilation, the kind of log.
    """

    frame: str
    about: str
    warning: bool
    reasons: list[str] = field(default_factory=list)

    def event(self) -> Event | None:
        """The recompile; None for a warning that names no function."""
        if self.warning and not self.frame:
            return None
        return Event(
            frame=self.frame,
            reasons=tuple(self.reasons),
            limit_hit=self.warning,
            warned=self.warning,
        )


def read_log_events(path: Path) -> Iterator[Event | GraphBreak]:
    """The recompiles and graph breaks of a log, in the order in which they end.

    Raises `VllmcError` (`unreadable-log`) where the disk fails.
    """
    blocks: dict[Sender, _Block] = {}
    try:
        for line in _lines(path):
            prefix = _PREFIX.match(line)
            sender, about = _sender(prefix)
            message = line[prefix.end() :] if prefix else line
            if _GRAPH_BREAK.match(message):
                yield GraphBreak()
            elif (block := _opened(message, about)) is not None:
                if (ended := blocks.pop(sender, None)) and (event := ended.event()):
                    yield event
                blocks[sender] = block
                if len(blocks) > _MAX_OPEN:
                    oldest = blocks.pop(next(iter(blocks)))
                    if event := oldest.event():
                        yield event
            elif (known := blocks.get(sender)) is not None and known.about == about:
                _carry_on(known, message)
    except OSError as error:
        raise VllmcError(
            "unreadable-log",
            f"{path} cannot be read: {error.strerror or error}",
            context={"path": str(path)},
            hint="give a log made with TORCH_LOGS=recompiles, or a TORCH_TRACE directory",
        ) from error
    for block in blocks.values():
        if event := block.event():
            yield event


def _lines(path: Path) -> Iterator[str]:
    """The lines that may count. Of a line without end, the parts are lines."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            if any(marker in line for marker in _MARKERS):
                yield line.decode("utf-8", "replace").rstrip("\r\n")


def _sender(prefix: re.Match[str] | None) -> tuple[Sender, str]:
    """Who wrote a line (what stands before its prefix, its process), and what it is about."""
    if prefix is None:
        return ("", ""), ""
    return (prefix["lead"], prefix["pid"] or ""), prefix["tags"] or prefix["marks"] or ""


def _opened(message: str, about: str) -> _Block | None:
    if header := _HEADER.search(message):
        return _Block(_frame(header), about, warning=False)
    return _Block("", about, warning=True) if _LIMIT.search(message) else None


def _carry_on(block: _Block, message: str) -> None:
    """Takes in a further line, which without a prefix may be anybody's."""
    if block.warning:
        if not block.frame and (function := _FUNCTION.match(message)):
            block.frame = _frame(function)
        elif not block.reasons and (last := _LAST_REASON.match(message)):
            block.reasons.append(last["reason"][:_MAX_REASON])
        return
    if (match := _REASON.match(message)) is None or len(block.reasons) == _MAX_REASONS:
        return
    reason = match["reason"][:_MAX_REASON]
    numbered = bool(block.reasons) and begins_entry(block.reasons[0])
    # Entries had no number before torch 2.5; beside those that have, a line without one is not
    # Dynamo's, or belongs to the entry above it.
    if begins_entry(reason) and not numbered:
        block.reasons = [reason]
    elif begins_entry(reason) or not numbered:
        block.reasons.append(reason)


def _frame(match: re.Match[str]) -> str:
    return frame_name(match["file"], int(match["line"]), match["function"])
