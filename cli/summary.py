"""The Markdown summary of `warm`, as GitHub Actions shows it on a run's page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmc.cli.render import duration, name_cost, named_argument, names, plain_value, size
from vllmc.core.errors import VllmcError

Row = Mapping[str, Any]

_SHOWN_CHANGES = 30


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """Appends the summary to `path`. Raises `VllmcError` (`not-writable`)."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(summary(rows))
    except OSError as error:
        raise VllmcError(
            "not-writable",
            f"the summary cannot be written to {path}",
            context={"cause": str(error)},
            hint="give another --summary FILE",
        ) from error


def summary(rows: Sequence[Row]) -> str:
    """A table of the models, then what each compiled and why it missed."""
    lines = [
        "### vllmc warm",
        "",
        "| model | outcome | hit | dup | compiled | unique pieces | time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        counts = row["counts"]
        unique = row["pieces"]["unique"] if row["pieces"] else ""
        # A prediction takes no time worth a figure.
        seconds = row["seconds"]["total"]
        lines.append(
            _line(
                row["model"],
                f"**{row['outcome']}**",
                counts["hit"],
                counts["dup"],
                counts["compiled"],
                unique,
                duration(seconds) if seconds else "",
            )
        )
    for row in rows:
        for part in (_reason(row), _units(row), _layer_names(row), _changes(row)):
            if part:
                lines += ["", *part]
    return "\n".join(lines) + "\n"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _reason(row: Row) -> list[str]:
    return [f"{row['model']}: {row['reason']}"] if row.get("reason") else []


def _units(row: Row) -> list[str]:
    compiled = [unit for unit in row["units"] if unit["outcome"] != "hit"]
    if not compiled:
        return []
    table = [f"#### {row['model']}: compiled", "", "| pieces | range | size | time |"]
    table.append("|---|---|---:|---:|")
    table += [
        _line(names(u["pieces"]), u["range"], size(u["bytes"]), duration(u["seconds"]))
        for u in compiled
    ]
    return table


def _layer_names(row: Row) -> list[str]:
    found = row["layer_names"]
    if found is None:
        return []
    lines = [f"{row['model']}: {name_cost(found)}"]
    for fix, ops in itertools.groupby(found["ops"], key=lambda op: op["fix"]):
        lines += ["", *(f"- {named_argument(op)}" for op in ops)]
        lines += ["", "```", *fix.splitlines(), "```"]
    return lines


def _changes(row: Row) -> list[str]:
    changes = row["miss"]["changes"] if row["miss"] else []
    if not changes:
        return []
    table = [f"#### {row['model']}: what differs from the nearest program", ""]
    table += ["| factor | before | after | origin |", "|---|---|---|---|"]
    table += [
        _line(
            f"{change['group']}.{change['name']}",
            plain_value(change["before"]),
            plain_value(change["after"]),
            change["origin_after"] or change["origin_before"],
        )
        for change in changes[:_SHOWN_CHANGES]
    ]
    if len(changes) > _SHOWN_CHANGES:
        table += ["", f"and {len(changes) - _SHOWN_CHANGES} more"]
    return table
