"""What passes did, told to who asks. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllmc.core.cache.key import JsonValue


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMiss:
    """Where the closest match of a pass failed: at `node`, of what was `expected` and `found`.

    `matched` is how many nodes had matched by then; `graph` names the piece that holds the node.
    """

    node: str
    expected: str
    found: str
    matched: int
    graph: str = ""

    def to_json(self) -> dict[str, JsonValue]:
        """The `missed` object of `warm --json`."""
        return {
            "graph": self.graph,
            "node": self.node,
            "expected": self.expected,
            "found": self.found,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """What one pass did to one graph, or to several: its matches, their nodes, its wall time.

    `missed` is the closest match that failed, where its ops were there.
    """

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float
    missed: NearMiss | None

    def to_json(self) -> dict[str, JsonValue]:
        """A row of `passes` of `warm --json`."""
        return {
            "name": self.name,
            "matches": self.matches,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "seconds": round(self.seconds, 6),
            "missed": None if self.missed is None else self.missed.to_json(),
        }


def totals(graphs: Iterable[tuple[str, Iterable[PassReport]]]) -> tuple[PassReport, ...]:
    """One report for each pass, in the order in which they come first.

    `graphs` are the reports of each graph, with its name.
    """
    found: dict[str, list[PassReport]] = {}
    for graph, reports in graphs:
        for report in reports:
            miss = None if report.missed is None else replace(report.missed, graph=graph)
            found.setdefault(report.name, []).append(replace(report, missed=miss))
    return tuple(_total(rows) for rows in found.values())


def _total(rows: list[PassReport]) -> PassReport:
    misses = [row.missed for row in rows if row.missed is not None]
    return PassReport(
        name=rows[0].name,
        matches=sum(row.matches for row in rows),
        nodes_before=sum(row.nodes_before for row in rows),
        nodes_after=sum(row.nodes_after for row in rows),
        seconds=sum(row.seconds for row in rows),
        missed=max(misses, key=lambda miss: miss.matched, default=None),
    )
