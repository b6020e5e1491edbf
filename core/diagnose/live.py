"""What compiles again while a program runs, whatever compiled it. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from vllmc.core.diagnose.recompiles import Event, Recompile, frame_name, summarize
from vllmc.core.torch_compat.recompiles import Compilations, watch_compilations


class LiveReport:
    """What was compiled in a block until now, or until its end: the rows of `vllmc recompiles`.

    `str()` is for a person.
    """

    def __init__(self, compilations: Compilations) -> None:
        self._compilations = compilations

    @property
    def recompiles(self) -> tuple[Recompile, ...]:
        """One row for each cause, in the order in which the causes first came."""
        return summarize(
            Event(
                frame=frame_name(seen.file, seen.line, seen.function),
                reasons=seen.reasons,
                seconds=seen.seconds,
                limit_hit=seen.limit_hit,
            )
            for seen in tuple(self._compilations.recompilations)
        )

    @property
    def graph_breaks(self) -> int:
        """How often a graph broke: no recompile, though each leaves a frame that may have some."""
        return self._compilations.graph_breaks

    @property
    def first_compilations(self) -> int:
        """How many frames were compiled for the first time: no recompiles."""
        return self._compilations.first_compilations

    def to_json(self) -> dict[str, Any]:
        """The rows and numbers, named as `vllmc recompiles --json` names them."""
        return {
            "recompiles": [recompile.to_json() for recompile in self.recompiles],
            "graph_breaks": self.graph_breaks,
            "first_compilations": self.first_compilations,
        }

    def __str__(self) -> str:
        rows = self.recompiles
        counts = (
            (sum(row.count for row in rows), "recompile"),
            (self.graph_breaks, "graph break"),
            (self.first_compilations, "first compilation"),
        )
        head = ", ".join(f"{number} {what}{'s' * (number != 1)}" for number, what in counts)
        return "\n".join([head, *map(_paragraph, rows)])


@contextlib.contextmanager
def watch_recompiles() -> Iterator[LiveReport]:
    """Reports what `torch.compile` compiles, and above all compiles again, while a block runs.

    The code may be anybody's, compiled by any backend; what other threads of the process compile
    is reported too. Blocks may be nested, each with a report of its own. The report can be read
    within the block and after it. Nothing of torch's or of its logging is changed or printed.
    """
    with watch_compilations() as compilations:
        yield LiveReport(compilations)


def _paragraph(row: Recompile) -> str:
    times = "once" if row.count == 1 else f"{row.count} times"
    cost = "" if row.cost_seconds is None else f", {row.cost_seconds:.2f} s"
    lines = [f"{row.frame}, {times}{cost}: {row.guard}", f"class: {row.klass}"]
    if row.expected:
        lines[-1] += f", expected {row.expected}"
        lines[-1] += f", found {row.observed}" if row.observed else ""
    if row.pattern:
        lines.append(f"pattern: {row.pattern}")
    if row.limit_hit:
        lines.append("the recompile limit was hit: eager since then (fullgraph=True: an error)")
    return "\n    ".join([*lines, f"fix: {row.fix}"])
