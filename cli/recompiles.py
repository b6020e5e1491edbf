"""`vllmc recompiles`: what a log or trace says was compiled again, why, and the cure.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vllmc.cli import report
from vllmc.cli.options import CommonFlags, command
from vllmc.core.diagnose.recompile_report import read_recompiles


@command
def recompiles(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DIR",
            help="A log made with TORCH_LOGS=recompiles, or a TORCH_TRACE directory.",
        ),
    ],
    common: CommonFlags,
) -> None:
    """Say what torch.compile compiled again, by a log or trace: cause, cost and cure.

    The log may come from any program and hold lines of others; TORCH_LOGS=recompiles_verbose is
    read too, and so is a log that holds only the warning that the recompile limit was hit.

    With --json: recompiles (frame, class: shape-0-1, shape, dtype, layout, int, string, object-id,
    global-state, index-width, type or other; guard, subject, expected, observed: of the first;
    count, with the attempt that hit the limit; limit_hit: the frame ran eager afterwards;
    cost_seconds: of all, or null; pattern: how the values went on, or empty; dropped: false, see
    run; fix), graph_breaks and first_compilations (no recompiles: their number, null where it is
    not known) and notes.
    """
    found = read_recompiles(path)
    row: dict[str, Any] = {
        "recompiles": [recompile.to_json() for recompile in found.recompiles],
        "graph_breaks": found.graph_breaks,
        "first_compilations": found.first_compilations,
        "notes": list(found.notes),
    }
    common.output("recompiles").data(row, lambda: report.recompiles(row))
