"""What CI should show beside the matrix file: GitHub's annotations, GitLab's code quality report.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from vllmc.cli.prewarm import Place, Result, told_rows
from vllmc.cli.render import names, plain_value
from vllmc.cli.side_files import write_text
from vllmc.cli.warm_rows import Row
from vllmc.core.cache.redaction import scrub

_SHOWN_CHANGES: Final = 3
_MEANINGS: Final[Mapping[str, str]] = {
    "failed": "could not be compiled",
    "would-miss": "would have to compile",
    "unknown": "may have to compile",
    "unsafe": "meets something in the cache that must not be used",
    "missed": "was compiled anew",
    "retried": "was compiled at a later attempt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a person should look at: `check` is a key of the meanings above."""

    level: Literal["error", "warning"]
    check: str
    name: str
    message: str
    place: Place | None

    @property
    def title(self) -> str:
        """The finding in a few words."""
        return f"{self.name} {_MEANINGS[self.check]}"


def find(results: Sequence[Result]) -> tuple[Finding, ...]:
    """What is wrong in the results (errors), and what moved or had to be tried again (warnings)."""
    rows = told_rows(results)
    found = (_finding(result, row) for result, row in zip(results, rows, strict=True))
    return tuple(finding for finding in found if finding is not None)


def _finding(result: Result, row: Row) -> Finding | None:
    if result.exit_code:
        return _made("error", row["outcome"], result, reason(row))
    if result.error is not None:
        return _made("warning", "retried", result, scrub(result.error.message))
    if row["counts"]["compiled"] + row["counts"]["dup"] and (changes := changes_of(row)):
        return _made("warning", "missed", result, changes)
    return None


def _made(level: Literal["error", "warning"], check: str, result: Result, message: str) -> Finding:
    place = result.task.place
    return Finding(level=level, check=check, name=result.task.name, message=message, place=place)


def reason(row: Mapping[str, Any]) -> str:
    """Why a row is not as it was asked to be: the error with its hint, or what would miss."""
    if "error" in row:
        hint = row["error"]["hint"]
        return f"{row['reason']} (hint: {hint})" if hint else row["reason"]
    changes = changes_of(row)
    return f"{row['reason']} ({changes})" if changes else row["reason"]


def changes_of(row: Mapping[str, Any]) -> str:
    """The first fields in which a row differs from the nearest program of its model, or nothing."""
    miss = row["miss"]
    if miss is None or miss["nearest_model"] is not None:
        return ""
    told = [
        f"{change['group']}.{change['name']}: {plain_value(change['before'])} -> "
        f"{plain_value(change['after'])}"
        for change in miss["changes"]
    ]
    return names(told, _SHOWN_CHANGES) if told else ""


def github(findings: Iterable[Finding], root: Path) -> tuple[str, ...]:
    """Workflow commands, one line each, with paths relative to the checkout `root`.

    See https://docs.github.com/actions/reference/workflow-commands-for-github-actions; how values
    are escaped is told by the toolkit that GitHub gives (packages/core/src/command.ts).
    """
    lines = []
    for finding in findings:
        fields = {"title": finding.title}
        if finding.place is not None:
            file = _relative(finding.place.file, root)
            fields = {"file": file, "line": str(finding.place.line), **fields}
        told = ",".join(f"{name}={_property(value)}" for name, value in fields.items())
        lines.append(f"::{finding.level} {told}::{_data(finding.message)}")
    return tuple(lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def write_code_quality(path: Path, findings: Iterable[Finding], root: Path) -> None:
    """Writes GitLab's code quality report, with paths relative to the checkout `root`.

    See https://docs.gitlab.com/ci/testing/code_quality/: findings with one fingerprint are one, in
    this pipeline and in that of the target branch, so it is the same wherever the entry moves to.
    Raises `VllmcError` (`not-writable`).
    """
    rows = []
    for finding in findings:
        assert finding.place is not None, finding
        file = _relative(finding.place.file, root)
        told = "\0".join((file, finding.name, finding.check))
        rows.append(
            {
                "description": f"{finding.title}: {finding.message}",
                "check_name": f"vllmc-{finding.check}",
                "fingerprint": hashlib.sha256(told.encode()).hexdigest(),
                "severity": "major" if finding.level == "error" else "minor",
                "location": {"path": file, "lines": {"begin": finding.place.line}},
            }
        )
    write_text(path, json.dumps(rows, indent=2) + "\n", "--code-quality")


def _relative(file: Path, root: Path) -> str:
    file, root = file.resolve(), root.resolve()
    return (file.relative_to(root) if file.is_relative_to(root) else file).as_posix()
