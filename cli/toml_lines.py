"""Where each key of a TOML text stands, which `tomllib` does not say. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str, ...]


def line_numbers(text: str) -> dict[KeyPath, int]:
    """The line of each key and table of a valid TOML text, counted from 1.

    The path of a `[[table]]` ends in its number, counted from 0. Each statement of a TOML text is
    valid TOML by itself: one that is not yet goes on in the next line.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        statement.append(line)
        try:
            parsed = tomllib.loads("\n".join(statement))
        except tomllib.TOMLDecodeError:
            continue
        first = number - len(statement) + 1
        paths = [path for path, _ in leaves(parsed)]
        opening = statement[0].lstrip()
        if opening.startswith("["):
            table = _numbered(paths[0], counts)
            if opening.startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, first)
                table = (*table, str(counts[table]))
            lines.setdefault(table, first)
        else:
            for path in paths:
                for depth in range(1, len(path) + 1):
                    lines.setdefault(table + path[:depth], first)
        statement = []
    return lines


def _numbered(path: KeyPath, counts: Mapping[KeyPath, int]) -> KeyPath:
    """`path` with the number of the last table wherever it goes through a list of tables."""
    *above, name = path
    found: KeyPath = ()
    for part in above:
        found = (*found, part)
        if found in counts:
            found = (*found, str(counts[found]))
    return (*found, name)


def leaves(value: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Everything in a table and the tables below it, by its path; an empty table is one too."""
    for name, item in value.items():
        path = (*prefix, name)
        if isinstance(item, dict) and item:
            yield from leaves(item, path)
        else:
            yield path, item
