"""Recompiles, classified: which guard failed, what it expected and saw, and what to change.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

from vllmc.core.cache.key import REDACTED
from vllmc.core.cache.redaction import redact, scrub

RecompileClass: TypeAlias = Literal["shape-0-1", "shape", "dtype", "int", "string", "other"]

_FIXES: dict[str, str] = {
    "shape-0-1": "mark the dimension before the first call: "
    "torch._dynamo.decorators.mark_unbacked(tensor, dim)",
    "shape": "mark the dimension before the first call: torch._dynamo.mark_dynamic(tensor, dim)",
    "dtype": "convert the tensor to one dtype before the call",
    "int": "pass the number as a tensor, or keep it constant",
    "string": "keep the string out of the compiled function, or wrap it in an opaque value",
    "other": "see what changes the guarded value between calls",
}

_ATTEMPT = re.compile(r"^\s*-?\s*\d+/\d+(?:_\d+)?:\s*")
_COMMENT = re.compile(r"\s+#.*$")
_SIZE = re.compile(
    r"tensor '(?P<subject>[^']+)' size mismatch at index (?P<dim>\d+)\. "
    r"expected (?P<expected>\d+), actual (?P<observed>\d+)"
)
_DTYPE = re.compile(
    r"tensor '(?P<subject>[^']+)' dtype mismatch\. expected (?P<expected>\w+), "
    r"actual (?P<observed>\w+)"
)
_SYMBOL = re.compile(r"(?P<expected>[2-9]|\d{2,})\s*<=\s*(?P<subject>\S+\.size\(\)\[\d+\])")
_NAMES = re.compile(r"\w+")
_EQUALS = re.compile(r"^(?P<subject>.+?) == (?P<expected>.+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompile:
    """One cause of recompiles, as `--json` reports it. `count` recompiles had it.

    `cost_seconds` is the sum of their compile times, None where it is not known.
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

    def to_json(self) -> dict[str, Any]:
        """The RECOMPILE row of docs/cli.md."""
        row = asdict(self)
        row["class"] = row.pop("klass")
        return row


def explain(
    *, file: str, line: int, function: str, reason: str, seconds: float | None
) -> Recompile:
    """Classifies one recompile from the reason that Dynamo gives.

    Dynamo lists every earlier cache entry; the last line is about the newest, whose guard tells
    what changed since then.
    """
    lines = [text for text in reason.splitlines() if _ATTEMPT.match(text)] or [reason]
    guard = scrub(_COMMENT.sub("", _ATTEMPT.sub("", lines[-1])).strip())
    klass, subject, expected, observed = _classify(guard)
    if klass == "string" and redact(_NAMES.findall(subject)[-1], expected) == REDACTED:
        guard, expected = f"{subject} == {REDACTED}", REDACTED
    return Recompile(
        frame=f"{PurePath(file).name}:{line} in {function}",
        klass=klass,
        guard=guard,
        subject=subject,
        expected=expected,
        observed=observed,
        fix=_FIXES[klass],
        cost_seconds=seconds,
    )


def merge(rows: Iterable[Recompile]) -> tuple[Recompile, ...]:
    """One row for each frame and guard, counted, in the order in which they first appear."""
    merged: dict[tuple[str, str], Recompile] = {}
    for row in rows:
        identity = (row.frame, row.guard)
        if (known := merged.get(identity)) is None:
            merged[identity] = row
            continue
        costs = [c for c in (known.cost_seconds, row.cost_seconds) if c is not None]
        merged[identity] = replace(
            known, count=known.count + row.count, cost_seconds=sum(costs) if costs else None
        )
    return tuple(merged.values())


def _classify(guard: str) -> tuple[RecompileClass, str, str, str]:
    if size := _SIZE.search(guard):
        small = {size["expected"], size["observed"]} & {"0", "1"}
        subject = f"{size['subject']}.size()[{size['dim']}]"
        return ("shape-0-1" if small else "shape", subject, size["expected"], size["observed"])
    if dtype := _DTYPE.search(guard):
        return "dtype", dtype["subject"], dtype["expected"], dtype["observed"]
    if symbol := _SYMBOL.search(guard):
        return "shape-0-1", symbol["subject"], f">= {symbol['expected']}", "0 or 1"
    if equals := _EQUALS.match(guard):
        subject, expected = equals["subject"], equals["expected"]
        if re.fullmatch(r"-?\d+", expected):
            return ("shape" if ".size()" in subject else "int"), subject, expected, ""
        if re.fullmatch(r"'.*'|\".*\"", expected):
            return "string", subject, expected, ""
    return "other", "", "", ""
