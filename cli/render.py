"""What results look like to a person: tables, sizes, durations. Imports no torch.

Tables are given the rows that `--json` prints, so both show the same facts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

Row: TypeAlias = Mapping[str, Any]

_KEY_DIGITS = 12
_DIGEST = re.compile(r"(?P<how>sha256:)?(?P<hex>[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{16})")
_VALUE_LENGTH = 160
_NOTE_LENGTH = 60
_LEGIBLE = 16
_GAP = 2


def short_key(key: str) -> str:
    """A key or digest as people see it: enough hex digits to be told apart, and to be typed."""
    return key[:_KEY_DIGITS]


def size(count: float) -> str:
    """A number of bytes: `17 B`, `1.6 MB`."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def quantity(count: float) -> str:
    """A large count: `135M`, `70.6B`."""
    return _scaled(count, 1000, ("", "K", "M", "B", "T")).replace(" ", "")


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    last = len(units) - 1
    rank = 0
    while rank < last and value >= step - 0.5:
        value /= step
        rank += 1
    digits = 1 if rank and value < 99.95 else 0
    return f"{value:.{digits}f} {units[rank]}"


def duration(seconds: float) -> str:
    """A time span: `4 ms`, `1.2 s`, `2 min 5 s`, `1 h 4 min`, `12 d`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d"


def moment(timestamp: float) -> str:
    """A unix time as local date and time."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")


def plain_value(value: object) -> str:
    """A JSON value in one line, a long one or a digest cut short."""
    text = value if isinstance(value, str) and value else json.dumps(value, sort_keys=True)
    if found := _DIGEST.fullmatch(text):
        return (found["how"] or "") + short_key(found["hex"])
    return text if len(text) <= _VALUE_LENGTH else f"{text[: _VALUE_LENGTH - 4]} ..."


def models(rows: Iterable[Row]) -> RenderableType:
    """The table of presets."""
    return Listing(
        headings=("NAME", "ARCHITECTURE", ">LAYERS", ">HIDDEN SIZE", ">PARAMETERS"),
        rows=tuple(
            (
                row["name"],
                row["architecture"],
                str(row["layers"]),
                str(row["hidden_size"]),
                quantity(row["parameters"]),
            )
            for row in rows
        ),
    )


def entries(rows: Sequence[Row]) -> RenderableType | str:
    """The table of `cache ls`."""
    if not rows:
        return "the cache is empty"
    return Listing(
        headings=("KEY", "MODEL", ">UNITS", ">SIZE", "CREATED", "LAST USED"),
        rows=tuple(
            (
                short_key(row["key"]),
                row["model"],
                str(row["units"]),
                size(row["bytes"]),
                moment(row["created"]),
                moment(row["last_used"]),
            )
            for row in rows
        ),
    )


def stats(row: Row) -> RenderableType:
    """The numbers of `cache stats`."""
    sums = facts(
        ("programs", str(row["programs"])),
        ("units", str(row["units"])),
        ("artifacts", f"{row['artifacts']}, {size(row['bytes'])}"),
        ("unreferenced", size(row["unreferenced_bytes"])),
        ("inodes", str(row["inodes"])),
        ("hits", f"{row['hits']}, which saved {duration(row['seconds_saved'])}"),
        ("misses", f"{row['misses']}, {row['dups']} of them dups"),
    )
    if not row["by_model"]:
        return sums
    by_model = Listing(
        headings=("MODEL", ">PROGRAMS", ">SIZE", ">HITS", ">MISSES", ">DUPS", ">SAVED"),
        rows=tuple(
            (
                m["model"],
                str(m["programs"]),
                size(m["bytes"]),
                *(str(m[name]) for name in ("hits", "misses", "dups")),
                duration(m["seconds_saved"]),
            )
            for m in row["by_model"]
        ),
    )
    return Group(sums, "", by_model)


def problems(rows: Sequence[Row], removed: Sequence[Row]) -> RenderableType | str:
    """What `cache verify` found, and what `--repair` removed."""
    if not rows:
        return "the cache is intact"
    found = Listing(
        headings=("KIND", "PATH", "WHAT"),
        rows=tuple((row["kind"], row["path"], row["detail"]) for row in rows),
    )
    if not removed:
        return found
    gone = Listing(
        headings=("REMOVED", "WHY"), rows=tuple((row["path"], row["reason"]) for row in removed)
    )
    return Group(found, "", gone)


def pruned(row: Row) -> RenderableType | str:
    """What `cache prune` removed, or with `--dry-run` would, and what it kept."""
    going = row["plan"] if row["dry_run"] else row["removed"]
    parts: list[RenderableType] = []
    if going:
        parts += [_gone(going, "WOULD GO" if row["dry_run"] else "REMOVED"), ""]
    if row["kept"]:
        parts += [_gone(row["kept"], "KEPT"), ""]
    freed = size(row["bytes_before"] - row["bytes_after"])
    left = size(row["bytes_after"])
    would = "would free" if row["dry_run"] else "freed"
    return Group(*parts, f"{would} {freed}; {left} {'would be' if row['dry_run'] else 'are'} left")


def _gone(rows: Sequence[Row], title: str) -> Listing:
    """A line for each program with what goes with it, and one for each reason of the rest."""
    sums: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sums.setdefault((row["program"], "" if row["program"] else row["reason"]), []).append(row)
    return Listing(
        headings=(title, "MODEL", ">FILES", ">SIZE", "WHY"),
        rows=tuple(
            (
                short_key(program) if program else "-",
                files[0]["model"] or "-",
                str(len(files)),
                size(sum(row["bytes"] for row in files)),
                files[0]["reason"],
            )
            for (program, _), files in sums.items()
        ),
    )


def trusted(rows: Sequence[Row]) -> RenderableType | str:
    """The table of `trust ls`."""
    if not rows:
        return "no key is trusted"
    return Listing(headings=("NAME", "KEY"), rows=tuple((row["name"], row["key"]) for row in rows))


def bundle(row: Row) -> RenderableType:
    """What `cache export` wrote."""
    return Group(
        facts(
            ("bundle", row["bundle"]),
            ("file", f"{row['file']}, {size(row['bytes'])}, {len(row['files'])} files"),
            ("signed by", row["signed_by"] or "nobody"),
        ),
        "",
        _bundled(row["programs"]),
    )


def imported(row: Row) -> RenderableType:
    """What `cache import` took in."""
    return Group(
        facts(
            ("bundle", f"{row['bundle']}, {row['vouched']}"),
            ("files", f"{row['added']} new of {len(row['files'])}"),
        ),
        "",
        _bundled(row["programs"]),
    )


def moved(verb: str, row: Row) -> RenderableType:
    """What `cache push` and `cache pull` did; `verb` is how the row names the files."""
    return facts(
        ("remote", row["remote"]),
        (verb, f"{row[verb]} files, {size(row['bytes'])}"),
        ("there already", f"{row['skipped']} files"),
        ("programs", "\n".join(row["programs"]) or "none"),
    )


def _bundled(rows: Sequence[Row]) -> RenderableType:
    return Listing(
        headings=("KEY", "MODEL", ">UNITS", "CREATED", "TORCH"),
        rows=tuple(
            (
                short_key(row["key"]),
                row["model"],
                str(row["units"]),
                moment(row["created"]),
                str(row["factors"].get("versions.torch")),
            )
            for row in rows
        ),
    )


def programs(rows: Sequence[Row], imports: Sequence[Row]) -> RenderableType:
    """A program's records, as `cache show` prints them, and where they came from."""
    first, *others = map(_program, rows)
    others += [
        facts(("imported", f"{moment(row['at'])} from {row['source']}, {_vouched(row)}"))
        for row in imports
    ]
    return Group(first, *(part for other in others for part in ("", other)))


def _vouched(row: Row) -> str:
    return f"signed by {row['signed_by']}" if row["signed_by"] else "not signed: --trust-unsigned"


def _program(row: Row) -> RenderableType:
    head = facts(
        ("key", short_key(row["key"])),
        ("record", short_key(row["id"])),
        ("model", row["model"]),
        ("created", moment(row["created"])),
        ("pieces", ", ".join(f"{count} {name}" for name, count in row["pieces"].items())),
    )
    units = Listing(
        headings=("UNIT", "RANGE", "PIECES", "ARTIFACT"),
        rows=tuple(
            (short_key(u["key"]), u["range"], names(u["pieces"]), short_key(u["artifact"]))
            for u in row["units"]
        ),
    )
    sources = Listing(
        headings=("SOURCE", "DIGEST", "FUNCTIONS"),
        rows=tuple(
            (f"{s['package']}/{s['path']}", short_key(s["digest"]), ", ".join(s["functions"]))
            for s in row["sources"]
        ),
    )
    return Group(head, "", units, "", sources, "", factor_groups(row["factor_groups"]))


def unit(row: Row) -> RenderableType:
    """A compile unit's record, as `cache show` prints it."""
    head = facts(
        ("key", short_key(row["key"])),
        ("artifact", short_key(row["artifact"])),
        ("format", row["format"]),
        ("size", size(row["bytes"])),
        ("code", short_key(row["code"])),
        ("compiled in", duration(row["seconds"])),
        ("created", moment(row["created"])),
    )
    return Group(head, "", factor_groups(row["factor_groups"]))


def factor_groups(rows: Iterable[Row]) -> RenderableType:
    """How many factors each group has, and which are not at their default."""
    return Listing(
        headings=("GROUP", ">FACTORS", "NOT AT DEFAULT"),
        rows=tuple((row["group"], str(row["factors"]), names(row["not_default"])) for row in rows),
    )


def factors(rows: Iterable[Row], limit: int | None = None) -> RenderableType:
    """Every factor with its value and origin, one table per group; of each group the first ones."""
    parts: list[RenderableType] = []
    for group, members in itertools.groupby(rows, key=lambda row: row["group"]):
        found = tuple(map(_factor, members))
        listing = Listing(headings=("FACTOR", "VALUE", "ORIGIN"), rows=found[:limit])
        parts += ["", Text(group, style="bold"), listing]
        if limit is not None and len(found) > limit:
            parts.append(Text(f"and {len(found) - limit} more; -v shows them", style="dim"))
    return Group(*parts[1:])


def _factor(row: Row) -> tuple[str, ...]:
    name = row["name"] if row["affects_key"] else f"{row['name']} (not in the key)"
    return (name, plain_value(row["value"]), _origin(row, "origin"))


def changes(rows: Iterable[Row]) -> RenderableType:
    """The rows CHANGE: which factor, from what to what, why, and of which class.

    Notes too long for a table stand below it.
    """
    rows = tuple(rows)
    table = Listing(
        headings=("FACTOR", "CHANGE", "ORIGIN", "CLASS"), rows=tuple(map(_change, rows))
    )
    below = [
        Text.assemble((f"{row['group']}.{row['name']}", "bold"), f": {row['note']}")
        for row in rows
        if _is_long(row["note"])
    ]
    return Group(table, "", *below) if below else table


def _change(row: Row) -> tuple[str, ...]:
    before, after = plain_value(row["before"]), plain_value(row["after"])
    change = {"added": f"+ {_outline(row['after'])}", "removed": f"- {_outline(row['before'])}"}
    note = f" ({row['note']})" if row["note"] and not _is_long(row["note"]) else ""
    return (
        f"{row['group']}.{row['name']}",
        change.get(row["kind"], f"{before} -> {after}"),
        _origin(row, "origin_before" if row["kind"] == "removed" else "origin_after"),
        row["class"] + ("" if row["affects_key"] else ", not in the key") + note,
    )


def _outline(value: object) -> str:
    """What was added or removed: of a module its class, which says more than a part of it all."""
    match value:
        case {"class": str(name)}:
            return plain_value(name)
    return plain_value(value)


def count(number: int, noun: str) -> str:
    """`1 factor`, `2 factors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_long(note: str) -> bool:
    return len(note) > _NOTE_LENGTH


def _origin(row: Row, field: str) -> str:
    # A factor that is itself a variable does not name it twice.
    return "env" if row[field] == f"env:{row['name']}" else str(row[field])


def names(items: Sequence[str], limit: int = 4) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown


def name_cost(row: Row) -> str:
    """What `layer_names` of a warmed model says, in a sentence."""
    taken = f"{size(row['bytes'])} stored"
    if row["compiled"]:
        units = count(row["compiled"], "more unit")
        taken = f"{units} compiled in {duration(row['seconds'])}, {taken}"
    return (
        f"layer-name strings made {row['unique']} pieces unique that would otherwise be "
        f"{row['would_be']}: {taken}"
    )


def named_argument(row: Row) -> str:
    """One of the `ops` of `layer_names`: where the strings are, and which."""
    first, last = row["examples"]
    return (
        f"{row['op']}, argument {row['argument']}: {row['values']} strings, {first!r} to {last!r}"
    )


def facts(*rows: tuple[str, str]) -> RenderableType:
    """Names and values, below each other."""
    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Rows as a table; where that would be too narrow to read, as one block of lines per row.

    A heading that starts with `>` is that of a column of numbers.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Chooses the form by the width at hand."""
        titles = [heading.removeprefix(">") for heading in self.headings]
        columns = zip(titles, *self.rows, strict=True)
        needed = sum(min(_LEGIBLE, max(map(cell_len, column))) + _GAP for column in columns)
        if needed > options.max_width:
            for index, row in enumerate(self.rows):
                if index:
                    yield ""
                yield facts(*zip(titles, row, strict=True))
            return
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        for heading, title in zip(self.headings, titles, strict=True):
            numeric = heading != title
            table.add_column(title, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        yield table
