"""The Markdown summary of `warm`, as GitHub Actions shows it on a run's page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmc.cli.render import duration, name_cost, named_argument, names, plain_value, size
from vllmc.cli.side_files import write_text

Row = Mapping[str, Any]

_SHOWN_CHANGES = 30
# What Markdown would read as more than text; within a word an underscore is one.
_MARKUP = re.compile(r"[\\`*<>\[\]|&~]|(?<!\w)_|_(?!\w)")


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Appends the summary to `path`. Raises `VllmcError` (`not-writable`)."""
    write_text(path, summary(rows), "--summary", append=True)


def summary(rows: Sequence[Row]) -> str:
    """A table of the models, then of each what was compiled, and why it missed or failed."""
    lines = [
        "### vllmc warm",
        "",
        "| model | outcome | hit | dup | compiled | unique pieces | size | time | saved |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_total(_text(row["name"]), f"**{row['outcome']}**", [row]) for row in rows),
    ]
    if len(rows) > 1:
        lines.append(_total("**all**", "", rows))
    for row in rows:
        for part in (_reason(row), _units(row), _layer_names(row), _changes(row)):
            if part:
                lines += ["", *part]
    return "\n".join(lines) + "\n"


def _total(name: str, outcome: str, rows: Sequence[Row]) -> str:
    """A line of the first table. Saved is what units that were found took to compile, once."""
    counts = [sum(row["counts"][kind] for row in rows) for kind in ("hit", "dup", "compiled")]
    unique = sum(row["pieces"]["unique"] for row in rows if row["pieces"])
    stored = {unit["artifact"]: unit["bytes"] for row in rows for unit in row["units"]}
    # A prediction takes no time worth a figure, and a miss saves none.
    total = sum(row["seconds"]["total"] for row in rows)
    saved = sum(row["saved_seconds"] for row in rows)
    return _line(
        name,
        outcome,
        *counts,
        unique or "",
        size(sum(stored.values())) if stored else "",
        *(duration(seconds) if seconds else "" for seconds in (total, saved)),
    )


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _text(value: str) -> str:
    """A text in one line, all of which Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(value.split()))


def _reason(row: Row) -> list[str]:
    if not row.get("reason"):
        return []
    hint = row["error"]["hint"] if "error" in row else ""
    return [_text(f"{row['name']}: {row['reason']}{f' (hint: {hint})' if hint else ''}")]


def _units(row: Row) -> list[str]:
    compiled = [unit for unit in row["units"] if unit["outcome"] != "hit"]
    if not compiled:
        return []
    table = [f"#### {_text(row['name'])}: compiled", "", "| pieces | range | size | time |"]
    table.append("|---|---|---:|---:|")
    table += [
        _line(_text(names(u["pieces"])), u["range"], size(u["bytes"]), duration(u["seconds"]))
        for u in compiled
    ]
    return table


def _layer_names(row: Row) -> list[str]:
    found = row["layer_names"]
    if found is None:
        return []
    lines = [_text(f"{row['name']}: {name_cost(found)}")]
    for fix, ops in itertools.groupby(found["ops"], key=lambda op: op["fix"]):
        lines += ["", *(f"- {_text(named_argument(op))}" for op in ops)]
        lines += ["", "```", *fix.splitlines(), "```"]
    return lines


def _changes(row: Row) -> list[str]:
    changes = row["miss"]["changes"] if row["miss"] else []
    if not changes:
        return []
    table = [f"#### {_text(row['name'])}: what differs from the nearest program", ""]
    table += ["| factor | before | after | origin |", "|---|---|---|---|"]
    table += [
        _line(
            _text(f"{change['group']}.{change['name']}"),
            _text(plain_value(change["before"])),
            _text(plain_value(change["after"])),
            _text(change["origin_after"] or change["origin_before"]),
        )
        for change in changes[:_SHOWN_CHANGES]
    ]
    if len(changes) > _SHOWN_CHANGES:
        table += ["", f"and {len(changes) - _SHOWN_CHANGES} more"]
    return table
